"""The tokenizers' library interface against the published VQ-VAEs, and against PaliGemma's encoder and decoder."""

import cases
import jax
import numpy as np
import pytest
from torch_files import torch_save

from aitok_jax import DepthTokenizer, MaskTokenizer

PALIGEMMA = cases.directory() / "paligemma"


def load(name: str, folder, legacy: bool = False):
    """From a file such as MolmoAct's and Aurora's vae-final.pt: {"weights": …}, names with the prefix 'module.'."""
    case = cases.load(name)
    weights = {f"module.{key}": array for key, array in case.state_dict().items()}
    (folder / "vae-final.pt").write_bytes(torch_save(weights, "weights", legacy))
    return case, (MaskTokenizer if case.hp["use_norm"] else DepthTokenizer).load(folder / "vae-final.pt")


@cases.find("vqvae_*")
def test_published_tokenizers(name, tmp_path):
    case, tokenizer = load(name, tmp_path)
    ids = tokenizer.encode(case["in/img"][:, 0])
    np.testing.assert_array_equal(ids, case["out/ait_encode"])
    cases.check(tokenizer.decode(ids), case["out/ait_decode"])
    logits = cases.nhwc(case["in/soft_logits"])
    keys = case.keys("out/decode_soft_tau")
    assert keys
    for key in keys:
        probabilities = jax.nn.softmax(float(key.removeprefix("out/decode_soft_tau")) * logits)
        cases.check(tokenizer.decode_soft(probabilities), case[key])


@cases.find("vqvae_depth*")
def test_depth_maps_of_another_size(name, tmp_path):
    case, tokenizer = load(name, tmp_path, legacy=True)
    height, width = 10 * case.hp["downsample_ratio"], 3 * case.hp["downsample_ratio"]
    ids = tokenizer.encode(np.ones((height, width), np.float32))
    assert ids.shape == (30,)
    assert tokenizer.decode(ids, grid=(10, 3)).shape == (height, width)


@pytest.mark.skipif(not PALIGEMMA.is_dir(), reason=f"no {PALIGEMMA}")
def test_paligemma():
    tokenizer = MaskTokenizer.load(PALIGEMMA / "vae-oid-random.npz")
    arrays = np.load(PALIGEMMA / "paligemma_io.npz")
    np.testing.assert_array_equal(tokenizer.encode(arrays["masks"]), arrays["codes"])
    cases.check(2 * tokenizer.decode(arrays["codes"]) - 1, arrays["decoded"])
