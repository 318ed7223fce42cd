"""The tokenizers' library interface against the published VQ-VAEs, and against PaliGemma's encoder and decoder."""

import cases
import jax
import numpy as np
import pytest

from aitok_jax import DepthTokenizer, MaskTokenizer
from aitok_jax.convert.files import write_weights

PALIGEMMA = cases.directory() / "paligemma"


@cases.find("vqvae_*")
def test_published_tokenizers(name, tmp_path):
    case = cases.load(name)
    write_weights(tmp_path / "vae-final.safetensors", {f"module.{k}": v for k, v in case.state_dict().items()})
    tokenizer = (MaskTokenizer if case.hp["use_norm"] else DepthTokenizer).load(tmp_path / "vae-final.safetensors")
    ids = tokenizer.encode(case["in/img"][:, 0])
    np.testing.assert_array_equal(ids, case["out/ait_encode"])
    cases.check(tokenizer.decode(ids), case["out/ait_decode"])
    logits = cases.nhwc(case["in/soft_logits"])
    for key in case.keys("out/decode_soft_tau"):
        probabilities = jax.nn.softmax(float(key.removeprefix("out/decode_soft_tau")) * logits)
        cases.check(tokenizer.decode_soft(probabilities), case[key])


@pytest.mark.skipif(not PALIGEMMA.is_dir(), reason=f"no {PALIGEMMA}")
def test_paligemma():
    tokenizer = MaskTokenizer.load(PALIGEMMA / "vae-oid-random.npz")
    arrays = np.load(PALIGEMMA / "paligemma_io.npz")
    np.testing.assert_array_equal(tokenizer.encode(arrays["masks"]), arrays["codes"])
    cases.check(2 * tokenizer.decode(arrays["codes"]) - 1, arrays["decoded"])
