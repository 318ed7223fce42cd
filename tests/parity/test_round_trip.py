"""Full-size published name lists: converted and written back, every array is the same to the bit."""

import dataclasses
import json
import math
import zlib

import cases
import config_files
import numpy as np
import published as models
import pytest
from ml_collections import ConfigDict

from aitok_jax import Predictor, tasks
from aitok_jax.convert import published, rules
from aitok_jax.convert.__main__ import to_directory, to_file
from aitok_jax.convert.weight_files import read_weights, write_weights
from aitok_jax.models.swin_v2 import SwinV2
from aitok_jax.tasks.base import compiled_predict
from aitok_jax.training import checkpoint

NAMES = cases.directory() / "names.json"


def names_of(kind: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype)."""
    listed = json.loads(NAMES.read_text())["state_dicts"][kind]
    return {name: (tuple(shape), dtype) for name, (shape, dtype) in listed.items()}


@pytest.fixture(scope="module")
def noise():
    """Random bits, NaNs and all, that the arrays of a state dict are cut from."""
    return np.random.default_rng(0).integers(0, 2**32, 2**24, np.uint32).view(np.float32)


def random_weights(names: dict, noise: np.ndarray) -> dict[str, np.ndarray]:
    """Without the derived tables; no two arrays are alike."""
    weights = {}
    for name, (shape, _) in names.items():
        if rules.locate(name) is not None:
            start = zlib.crc32(name.encode()) % (len(noise) - math.prod(shape))
            weights[name] = noise[start : start + math.prod(shape)].reshape(shape)
    return weights


@pytest.mark.parametrize("kind", cases.full_models())
def test_written_back_to_the_bit(kind, noise):
    names = names_of(kind)
    weights = random_weights(names, noise)
    variables, config, report = published.convert(weights, config_files.load(*models.SET_UPS[kind]))
    assert report.used.keys() == weights.keys()
    assert not report.missing + report.unused + report.recomputed
    back = published.state_dict(variables, config)
    assert {name: (array.shape, str(array.dtype)) for name, array in back.items()} == names
    for name, array in weights.items():
        assert back[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("kind", cases.full_models("vqvae_*"))
def test_through_files(kind, noise, tmp_path):
    """With the prefix of data-parallel training; a checkpoint directory lies between."""
    weights = random_weights(names_of(kind), noise)
    write_weights(tmp_path / "in.safetensors", {f"module.{name}": array for name, array in weights.items()})
    report = to_directory(tmp_path / "in.safetensors", tmp_path / "run", config_files.load(*models.SET_UPS[kind]))
    assert len(report.used) == len(weights)
    to_file(tmp_path / "run", tmp_path / "out.safetensors")
    back = read_weights(tmp_path / "out.safetensors")
    for name, array in weights.items():
        assert back[name].tobytes() == array.tobytes(), name


def config_of(part) -> ConfigDict:
    """A config that builds this part alone."""
    defaults = {
        type(module): type(module)() for module in (part.solver.backbone, part.solver.transformer, part.tokenizer)
    }

    def fields(module) -> dict:
        default = defaults[type(module)]
        names = [field.name for field in dataclasses.fields(module) if field.name not in ("parent", "name")]
        return {name: getattr(module, name) for name in names if getattr(module, name) != getattr(default, name)}

    parts = {"backbone": part.solver.backbone, "transformer": part.solver.transformer, "tokenizer": part.tokenizer}
    plain = {name: getattr(part, name) for name in ("image_size", "pad_to", "flip", "soft_input", "soft_detokenize")}
    fields_of_parts = {name: fields(module) for name, module in parts.items()}
    vocabulary = dataclasses.asdict(part.vocabulary)
    return ConfigDict({"task": {"name": "depth", **plain, **fields_of_parts, "vocabulary": vocabulary}})


@cases.find("e2e_depth_parallel*")
def test_a_converted_solver_predicts_what_the_published_one_does(name, tmp_path):
    case = cases.load(name)
    state_dict = case.state_dict()
    params = models.from_state_dict(state_dict)["params"]
    flip = case.hp["shift_window"]["flip"]
    config = config_of(models.depth_part(case.hp["model"], params, case["in/img"].shape[-1], flip=flip))
    write_weights(tmp_path / "in.safetensors", state_dict)
    report = to_directory(tmp_path / "in.safetensors", tmp_path / "run", config)
    assert not report.missing + report.unused

    assert Predictor.load(tmp_path / "run").tasks == ("depth",)
    config, weights = checkpoint.load_inference(tmp_path / "run")
    predict = compiled_predict(tasks.build(config.task).parts["depth"])
    maps = predict(weights["params"], weights["model_state"], {"image": cases.nhwc(case["in/test_img"])})
    cases.check(maps["depth"], case["out/test_depth"])
    written = published.state_dict(weights, config)
    assert state_dict.keys() <= written.keys()
    cases.check(written["transformer.enc_embed"], state_dict["transformer.enc_embed"], 1e-6)


@cases.find("swinv2_*")
def test_relative_tables(name):
    case = cases.load(name)
    hp = case.hp
    backbone = SwinV2(
        embed_dim=hp["embed_dim"],
        depths=hp["depths"],
        num_heads=hp["num_heads"],
        windows=hp["window_size"],
        pretrain_windows=hp["pretrain_window_size"],
        use_shift=(False,) * len(hp["depths"]),
    )
    ours, theirs = published.relative_tables(backbone), case.state_dict()
    for key in [key for key in theirs if ".relative_" in key]:
        cases.check(ours[f"backbone.{key}"], theirs[key], 1e-6)
    assert any(".relative_" in key for key in theirs)
