"""Tokenizers as a library: where they are loaded from, what goes in and out, and PaliGemma's text form."""

import jax
import numpy as np
import pytest
import tiny_objects
from ml_collections import ConfigDict

import aitok_jax
from aitok_jax import tasks
from aitok_jax.convert import published
from aitok_jax.convert.weight_files import read_weights, write_weights
from aitok_jax.tasks.base import variable_shapes
from aitok_jax.tokenizers import DepthTokenizer, MaskTokenizer, parse_text, write_text
from aitok_jax.training import checkpoint

VAE = {"hidden": 4, "num_res_blocks": 1, "num_codes": 8, "code_dim": 6}
CONFIGS = {
    "depth": {
        "name": "depth_tokenizer",
        "image_size": 16,
        "mask_ratio": 0.0,
        "tokenizer": {**VAE, "downsample": 4},
    },
    "masks": {
        "name": "mask_tokenizer",
        "image_size": 64,
        "tokenizer": {**VAE, "downsample": 16, "objective": "mse", "use_norm": True, "max_value": 1.0},
    },
}


def variables_of(config: dict, seed: int = 0) -> dict:
    """Random weights."""
    rng = np.random.default_rng(seed)
    shapes = variable_shapes(tasks.build(config))
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), shapes)


def config_of(task: dict) -> ConfigDict:
    return ConfigDict({"name": "run", "task": task})


def spread(variables: dict, config: dict, maps: np.ndarray) -> dict:
    """With encoder outputs of `maps` as the codes, so that these maps have different ones."""
    (part,) = tasks.build(config).parts.values()
    model = part.tokenizer
    given = {"params": variables["params"], **variables["model_state"]}
    features = np.array(model.apply(given, maps[..., None], method="encode_features"))
    codes = variables["model_state"]["codebook"]["quantizer"]["embedding"]
    codes[:] = features.reshape(-1, codes.shape[-1])[: 2 * len(codes) : 2]
    return variables


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same two tokenizers as run directories, and as files."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind, task in CONFIGS.items():
        variables = spread(variables_of(task), task, maps_of(kind))
        checkpoint.save_inference(folder / kind, variables, config_of(task))
        write_weights(folder / f"{kind}.safetensors", published.state_dict(variables, config_of(task)))
    return folder


def maps_of(kind: str, count: int = 3) -> np.ndarray:
    rng = np.random.default_rng(1)
    if kind == "depth":
        return np.kron(rng.choice([0, 0.1, 10], (count, 8, 8)), np.ones((2, 2))).astype(np.float32)
    return np.kron(rng.integers(0, 2, (count, 8, 8)), np.ones((8, 8))).astype(np.float32)


CLASSES = {"depth": DepthTokenizer, "masks": MaskTokenizer}


def test_names_of_the_package():
    assert aitok_jax.DepthTokenizer is DepthTokenizer
    assert aitok_jax.MaskTokenizer is MaskTokenizer
    with pytest.raises(AttributeError, match="Tokenizer"):
        aitok_jax.Tokenizer  # noqa: B018


@pytest.mark.parametrize("kind", CLASSES)
def test_a_directory_and_a_file_give_the_same(kind, places):
    maps, results = maps_of(kind), []
    for path in (places / kind, places / f"{kind}.safetensors"):
        tokenizer = CLASSES[kind].load(path)
        ids = tokenizer.encode(maps)
        assert ids.dtype == np.int32
        assert ids.shape == (3, 16)
        assert len(np.unique(ids)) > 1
        decoded = tokenizer.decode(ids)
        assert (decoded.dtype, decoded.shape) == (np.float32, maps.shape)
        results.append((ids, decoded))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-6)


@pytest.mark.parametrize("kind", CLASSES)
def test_one_map_batch_and_grid(kind, places):
    tokenizer, maps = CLASSES[kind].load(places / kind), maps_of(kind)
    ids = tokenizer.encode(maps)
    np.testing.assert_array_equal(tokenizer.encode(maps[1]), ids[1])
    decoded = tokenizer.decode(ids)
    np.testing.assert_allclose(tokenizer.decode(ids[1]), decoded[1], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(tokenizer.decode(ids.reshape(3, 4, 4)), decoded)
    assert tokenizer.encode(maps[:0]).shape == (0, 16)
    assert tokenizer.decode(ids[:0]).shape == (0, *maps.shape[1:])


@pytest.mark.parametrize("kind", CLASSES)
def test_certain_soft_tokens_are_hard_ones(kind, places):
    tokenizer = CLASSES[kind].load(places / kind)
    ids = tokenizer.encode(maps_of(kind))
    certain = np.eye(tokenizer.num_codes)[ids]
    np.testing.assert_allclose(tokenizer.decode_soft(certain), tokenizer.decode(ids), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(tokenizer.decode_soft(certain[0]), tokenizer.decode(ids[0]), rtol=1e-3, atol=1e-4)
    mixed = 0.5 * certain + 0.5 / tokenizer.num_codes
    assert np.abs(tokenizer.decode_soft(mixed) - tokenizer.decode(ids)).max() > 1e-3


def test_depth_of_any_size(places):
    tokenizer = DepthTokenizer.load(places / "depth")
    maps = np.random.default_rng(0).uniform(0, 10, (2, 12, 20)).astype(np.float64)
    ids = tokenizer.encode(maps)
    assert tokenizer.grid(12, 20) == (3, 5)
    assert tokenizer.decode(ids, grid=[3, 5]).shape == maps.shape
    assert tokenizer.decode(ids.reshape(2, 3, 5)).shape == maps.shape
    with pytest.raises(ValueError, match=r"15 tokens a map do not fill a grid of \(3, 3\)"):
        tokenizer.decode(ids)
    with pytest.raises(ValueError, match="multiple of downsample=4"):
        tokenizer.encode(maps[:, :-1])


def test_masks_in_other_types(places):
    tokenizer, masks = MaskTokenizer.load(places / "masks"), maps_of("masks")
    for dtype in (bool, np.uint8, np.float64):
        np.testing.assert_array_equal(tokenizer.encode(masks.astype(dtype)), tokenizer.encode(masks))


def test_a_file_of_masks_does_not_say_their_size(places):
    """So that any square will do that the tokens fill."""
    tokenizer = MaskTokenizer.load(places / "masks.safetensors")
    assert tokenizer.size is None
    masks = maps_of("masks")[:, :32, :48][:, :, :32]
    ids = tokenizer.encode(masks)
    assert ids.shape == (3, 4)
    assert tokenizer.decode(ids).shape == masks.shape
    with pytest.raises(ValueError, match=r"S = a multiple of 16, got \(3, 24, 24\)"):
        tokenizer.encode(masks[:, :24, :24])


@pytest.mark.parametrize(
    ("kind", "maps", "message"),
    [
        ("depth", np.ones((16, 16), np.uint16), "floats in metres"),
        ("depth", np.ones((1, 16, 16, 1)), "floats in metres"),
        ("depth", np.full((16, 16), np.nan), "set pixels without annotation to 0"),
        ("depth", np.full((16, 16), -1.0), "at least 0"),
        ("masks", np.full((64, 64), 255, np.uint8), "0..1, got uint8 in 255..255"),
        ("masks", np.full((64, 64), np.nan), "in 0..1"),
        ("masks", np.ones((32, 32)), r"masks must be \[S,S\] .*S = 64, got \(32, 32\)"),
    ],
)
def test_maps_that_do_not_fit(kind, maps, message, places):
    with pytest.raises(ValueError, match=message):
        CLASSES[kind].load(places / kind).encode(maps)


@pytest.mark.parametrize(
    ("method", "tokens", "message"),
    [
        ("decode", np.zeros(16), "whole numbers"),
        ("decode", np.full(16, 8), r"0\.\.7, got 8\.\.8"),
        ("decode", np.full(16, -1), r"0\.\.7, got -1"),
        ("decode", np.zeros((2, 9), int), "a mask has"),
        ("decode", np.zeros((4, 4), int), "a mask has"),
        ("decode_soft", np.zeros((16, 7)), "K=8"),
        ("decode_soft", np.zeros((16, 8)), "apply a softmax to logits"),
        ("decode_soft", np.tile(np.array([2.0, -1, 0, 0, 0, 0, 0, 0]), (16, 1)), "apply a softmax"),
    ],
)
def test_tokens_that_do_not_fit(method, tokens, message, places):
    with pytest.raises(ValueError, match=message):
        getattr(MaskTokenizer.load(places / "masks"), method)(tokens)


def test_other_runs_and_files_are_refused(places, tmp_path):
    with pytest.raises(ValueError, match=r"is a run without depth_tokenizer"):
        DepthTokenizer.load(places / "masks")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        DepthTokenizer.load(tmp_path)
    write_weights(tmp_path / "other.safetensors", {"w": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match="no VQ-VAE under the published names"):
        DepthTokenizer.load(tmp_path / "other.safetensors")
    weights = read_weights(places / "depth.safetensors")
    del weights["decoder.0.bias"]
    write_weights(tmp_path / "lacks.safetensors", weights)
    with pytest.raises(ValueError, match=r"lacks decoder\.0\.bias"):
        DepthTokenizer.load(tmp_path / "lacks.safetensors")


@pytest.mark.parametrize("prefix", ["module.", "model._orig_mod."])
def test_prefixes_and_missing_averages(places, tmp_path, prefix):
    weights = read_weights(places / "depth.safetensors")
    del weights["_vq_vae._ema_w"], weights["_vq_vae._ema_cluster_size"]
    write_weights(tmp_path / "w.safetensors", {f"{prefix}{name}": array for name, array in weights.items()})
    maps = maps_of("depth")
    expected = DepthTokenizer.load(places / "depth").encode(maps)
    np.testing.assert_array_equal(DepthTokenizer.load(tmp_path / "w.safetensors").encode(maps), expected)


def test_two_names_that_are_one_without_prefixes(places, tmp_path):
    weights = read_weights(places / "depth.safetensors")
    twice = {f"{prefix}{name}": array for name, array in weights.items() for prefix in ("", "module.")}
    write_weights(tmp_path / "w.safetensors", twice)
    with pytest.raises(ValueError, match=r"(?s)w\.safetensors: .* and .* are one, .*; save one of the two models"):
        DepthTokenizer.load(tmp_path / "w.safetensors")


def test_a_solver_gives_its_frozen_tokenizer(tmp_path):
    config = config_of(tiny_objects.CONFIG)
    variables = variables_of(tiny_objects.CONFIG)
    checkpoint.save_inference(tmp_path / "run", variables, config)
    write_weights(tmp_path / "solver.safetensors", published.state_dict(variables, config))
    from_run = MaskTokenizer.load(tmp_path / "run")
    assert from_run.size == tiny_objects.CROP
    from_file = MaskTokenizer.load(tmp_path / "solver.safetensors")
    for ours, theirs in zip(*(jax.tree.leaves(t._variables) for t in (from_run, from_file)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="is a run without depth_tokenizer"):
        DepthTokenizer.load(tmp_path / "run")
    with pytest.raises(ValueError, match="no VQ-VAE"):
        DepthTokenizer.load(tmp_path / "solver.safetensors")


IDS = list(range(0, 128, 8))
SEGS = "".join(f"<seg{i:03d}>" for i in IDS)


def test_text_form():
    text = write_text([30, 10, 60, 40], IDS, height=50, width=100, label="cat")
    assert text == f"<loc0205><loc0307><loc0818><loc0614>{SEGS} cat"
    (parsed,) = parse_text(text, height=50, width=100)
    np.testing.assert_allclose(parsed["box"], [30, 10, 60, 40], atol=100 / 1023)
    np.testing.assert_array_equal(parsed["ids"], IDS)
    assert parsed["label"] == "cat"
    assert write_text(parsed["box"], parsed["ids"], 50, 100, parsed["label"]) == text


def test_text_of_several_objects():
    boxes = "<loc0000><loc0000><loc1023><loc1023>"
    first, second, third = parse_text(f" {boxes}{SEGS} red car ; {boxes} dog;{boxes}", height=4, width=8)
    np.testing.assert_array_equal(first["box"], [0, 0, 8, 4])
    assert first["label"] == "red car"
    assert second["ids"] is None
    assert (second["label"], third["label"]) == ("dog", "")
    assert parse_text(" ", 4, 8) == []


BOX = "<loc0000><loc0000><loc1023><loc1023>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat", "here are 0 and 0"),
        (BOX[9:], "here are 3 and 0"),
        (BOX + SEGS[8:], "here are 4 and 15"),
        (SEGS + BOX, "another order"),
        (BOX + "<loc1024>", "<loc1024> is neither"),
        (BOX + SEGS[8:] + "<seg128>", "<seg128> is neither"),
        (BOX + "<seg1>", "<seg1> is neither"),
        (BOX + "<seg٠٠٣>", "is neither"),
        (BOX + " cat " + SEGS, "before the label"),
        (BOX + ";", "here are 0 and 0"),
        (BOX + "<seg00", "before the label"),
    ],
)
def test_bad_text(text, message):
    with pytest.raises(ValueError, match=message):
        parse_text(text, 10, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box": [0, 0, 101, 10]}, "inside of an image of 50×100"),
        ({"box": [0, 0, 10]}, "inside of an image"),
        ({"box": [0, 0, np.nan, 10]}, "inside of an image"),
        ({"ids": IDS[1:]}, "a mask has 16 ids"),
        ({"ids": [128] * 16}, r"0\.\.127"),
        ({"label": "<b>"}, "must not hold"),
    ],
)
def test_what_cannot_be_written(options, message):
    with pytest.raises(ValueError, match=message):
        write_text(**({"box": [0, 0, 10, 10], "ids": IDS, "height": 50, "width": 100} | options))
