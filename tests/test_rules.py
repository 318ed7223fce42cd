"""Published names and layouts: which array goes where, and that the arithmetic is the same there."""

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from aitok_jax.convert import rules


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("backbone.patch_embed.proj.weight", "params/backbone/patch_embed/proj/kernel"),
        ("backbone.patch_embed.norm.weight", "params/backbone/patch_embed/norm/scale"),
        ("backbone.layers.2.blocks.17.norm2.bias", "params/backbone/layers_2/blocks_17/norm2/bias"),
        ("backbone.layers.0.blocks.1.attn.rpe_mlp.2.weight", "params/backbone/layers_0/blocks_1/attn/rpe_mlp_2/kernel"),
        ("backbone.layers.0.blocks.1.attn.logit_scale", "params/backbone/layers_0/blocks_1/attn/logit_scale"),
        ("backbone.layers.0.downsample.reduction.weight", "params/backbone/layers_0/downsample/reduction/kernel"),
        ("transformer.encoder.blocks.5.attn.wq.weight", "params/transformer/encoder/blocks_5/attn/wq/kernel"),
        ("transformer.stem_ln.weight", "params/transformer/stem_ln/scale"),
        ("module.transformer.norm.weight", "params/transformer/norm/scale"),
        ("transformer.det_embed", "params/transformer/task_embed"),
        ("module.transformer.voc_embed", "params/transformer/voc_embed"),
        ("encoder.4.net.2.weight", "params/encoder/layers_4/net_2/kernel"),
        ("decoder.10.bias", "params/decoder/layers_10/bias"),
        ("_vq_vae._embedding", "model_state/codebook/quantizer/embedding"),
        ("_vq_vae._ema_cluster_size", "model_state/codebook/quantizer/cluster_size"),
        ("_vq_vae._ema_w", "model_state/codebook/quantizer/ema_w"),
        ("depth_head.vqvae.encoder.0.weight", "model_state/depth_tokenizer/params/encoder/layers_0/kernel"),
        (
            "insseg_head.vqvae._vq_vae._ema_w",
            "model_state/mask_tokenizer/model_state/codebook/quantizer/ema_w",
        ),
    ],
)
def test_locate(name, path):
    assert "/".join(rules.locate(name)) == path


@pytest.mark.parametrize(
    "name",
    [
        "backbone.layers.0.blocks.1.attn.relative_coords_table",
        "backbone.layers.0.blocks.1.attn.relative_position_index",
        "transformer.enc_embed",
        "depth_head.transformer.voc_embed",
        "insseg_head.loss_seq.weight",
        "module.backbone.layers.0.blocks.1.attn_mask",
    ],
)
def test_derived_tables_have_no_counterpart(name):
    assert rules.locate(name) is None


def layout(name, array):
    return rules.to_layout(rules.locate(name), array)


def test_linear_layout_computes_the_same():
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(5, 3)), rng.normal(size=3)
    np.testing.assert_allclose(x @ layout("transformer.proj.weight", weight), weight @ x)


def test_convolution_layout_computes_the_same():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(5, 3, 4, 4)).astype(np.float32)  # out, in, rows, columns
    x = rng.normal(size=(1, 3, 4, 4)).astype(np.float32)
    theirs = np.einsum("bchw,fchw->bf", x, weight)  # one position of a valid cross-correlation
    kernel = layout("encoder.0.weight", weight)
    ours = jax.lax.conv_general_dilated(
        jnp.moveaxis(x, 1, -1), kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(ours[:, 0, 0], theirs, rtol=1e-4, atol=1e-5)


def test_transposed_convolution_layout():
    weight = np.random.default_rng(0).normal(size=(3, 5, 4, 4))  # in, out, rows, columns
    kernel = layout("decoder.4.weight", weight)
    assert kernel.shape == (4, 4, 3, 5)
    assert kernel[1, 2, 0, 4] == weight[0, 4, 1, 2]
    plain = layout("decoder.2.net.0.weight", np.zeros((5, 3, 3, 3)))
    assert plain.shape == (3, 3, 3, 5)


def test_tables_lose_their_axes_of_length_one():
    scale = np.arange(4.0).reshape(4, 1, 1)
    np.testing.assert_array_equal(layout("backbone.layers.0.blocks.0.attn.logit_scale", scale), np.arange(4.0))
    np.testing.assert_array_equal(layout("transformer.mask_embed", np.ones((1, 1, 6))), np.ones(6))
    embed = np.arange(12.0).reshape(3, 1, 4)
    np.testing.assert_array_equal(layout("transformer.det_embed", embed), embed[:, 0])
    table = np.ones((4, 7, 6))
    assert layout("transformer.dec_embed", table).shape == (4, 7, 6)


def test_from_state_dict():
    tree = published.from_state_dict(
        {
            "module.transformer.proj.weight": np.ones((5, 3)),
            "module.transformer.enc_embed": np.ones((1, 2, 2, 4)),
            "module.depth_head.vqvae._vq_vae._embedding": np.ones((7, 2)),
        }
    )
    assert tree["params"].keys() == {"transformer"}
    assert tree["params"]["transformer"]["proj"]["kernel"].shape == (3, 5)
    frozen = tree["model_state"]["depth_tokenizer"]
    assert frozen["model_state"]["codebook"]["quantizer"]["embedding"].shape == (7, 2)
