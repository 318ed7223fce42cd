"""What the published set-ups are, constant by constant: published_setups.json against what our configurations build.

A constant of the file that is not compared makes a test fail, and so does a changed one of `FIXED` below, which the
file does not have.
"""

import importlib
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

from aitok_jax import tasks
from aitok_jax.config import flatten, translated
from aitok_jax.data import map_transforms, object_transforms
from aitok_jax.evaluators import metrics
from aitok_jax.models import layers, losses, quantizer, swin_v2, transformer, vqvae
from aitok_jax.tasks.modalities.depth import EIGEN_CROP, MIN_DEPTH

SET_UPS = json.loads(Path(__file__).with_name("published_setups.json").read_text())
SOLVERS = [name for name, set_up in SET_UPS.items() if "transformer" in set_up]
TOKENIZERS = [name for name in SET_UPS if name not in SOLVERS]
PARTS = {"depth": "depth", "instances": "insseg", "detection": "det"}
POLICIES = {"step": "Step", "linear": "LinearAnnealing"}
NOT_COMPARED = {
    "ours": "says which configuration it is",
    "loss_scale": "of float16 arithmetic, which there is none of here",
    "seq_aug": "noise objects and corrupted labels are always on",
    "residul_type": "there is one kind of residual block",
}
NULLS = {  # what the published code takes where a set-up says nothing
    "optim.warmup_ratio": 0.1,
    "transformer.pad_to": 0,
    "transformer.soft_input": False,
    "transformer.soft_masks": False,
    "transformer.top_p": 0.4,
    "heads.depth.auxiliary_weight": 0.0,
    "heads.insseg.auxiliary_weight": 0.0,
    "heads.det.auxiliary_weight": 0.0,
}


def built(ours: str):
    """Configuration and task of 'configs/NAME.py:ARGUMENTS'."""
    path, _, arg = ours.partition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    config = translated(module.get_config(arg))
    return config, tasks.build(config.task)


def theirs(set_up: dict) -> dict:
    """The constants by dotted name, without heads that no batch is for and what NOT_COMPARED says."""
    heads = {name: head for name, head in set_up.get("heads", {}).items() if name in set_up["batch"]}
    flat = flatten({**set_up, "heads": heads})
    kept = {name: value for name, value in flat.items() if not NOT_COMPARED.keys() & set(name.split("."))}
    return {name: NULLS.get(name) if value is None else value for name, value in kept.items()}


def compare(ours: dict, set_up: dict) -> None:
    expected = theirs(set_up)
    ours = json.loads(json.dumps(ours))  # tuples as lists
    assert ours.keys() == expected.keys()
    wrong = {name: (ours[name], value) for name, value in expected.items() if ours[name] != pytest.approx(value)}
    assert not wrong, f"(ours, published): {wrong}"


def vqvae_of(tokenizer, side: int) -> dict:
    return {
        "tokens": (side // tokenizer.downsample) ** 2,
        "map_size": side,
        "code_dim": tokenizer.code_dim,
        "top_width": tokenizer.hidden * tokenizer.downsample // 2,
        "res_blocks": tokenizer.num_res_blocks,
        "codes": tokenizer.num_codes,
        "use_norm": tokenizer.use_norm,
        "soft_temperature": tokenizer.soft_temperature,
    }


def head_of(part) -> dict:
    maps, masks = part.kind == "maps", part.kind == "objects" and part.tokenizer is not None
    side = part.image_size if maps else part.mask_size
    return {
        "task_id": part.task_id,
        "loss_weight": part.loss_weight,
        "auxiliary_weight": part.aux_weight,
        "mask_weight": part.mask_weight if masks else None,
        "soft_detokenize": part.soft_detokenize if maps else None,
        "auxiliary_objects": part.aux_objects if masks and part.aux_weight else None,
        "norm_val": None if maps else part.image_size,
        **(vqvae_of(part.tokenizer, side) if part.tokenizer else dict.fromkeys(vqvae_of(vqvae.VQVAE(), 32))),
    }


def only(values) -> object:
    """The one value that all of these are."""
    (value,) = set(values)
    return value


def sampled(config, task) -> float:
    """The published evaluation of objects samples; here a variant of the final evaluation does."""
    for name, part in task.parts.items():
        if part.kind == "objects":
            return config.eval_variants[name][f"{name}_sampled"].top_p
    return 0.0


@pytest.mark.parametrize("name", SOLVERS)
def test_solver(name):
    set_up = SET_UPS[name]
    config, task = built(set_up["ours"])
    backbone, solver, parts = task.solver.backbone, task.solver.transformer, task.parts
    schedule = config.optim.schedule
    side = only(getattr(part, "pad_to", 0) or part.image_size for part in parts.values())
    ours = {
        "backbone": {
            "embed_dim": backbone.embed_dim,
            "depths": backbone.depths,
            "num_heads": backbone.num_heads,
            "windows": backbone.windows,
            "use_shift": backbone.use_shift,
            "pretrain_windows": backbone.pretrain_windows,
            "drop_path": backbone.drop_path,
            "in_channels_of_transformer": backbone.embed_dim * 2 ** (len(backbone.depths) - 1),
        },
        "transformer": {
            "dim": solver.dim,
            "num_heads": solver.num_heads,
            "hidden": solver.hidden,
            "encoder_layers": solver.encoder_layers,
            "decoder_layers": solver.decoder_layers,
            "drop_path": solver.drop_path,
            "dropout": solver.dropout,
            "vocab_size": solver.vocab_size,
            "max_length": solver.max_length,
            "grid": [side // backbone.stride] * 2,
            "parallel": solver.parallel,
            "soft_input": only(part.soft_input for part in parts.values()),
            "soft_masks": only(part.soft_detokenize for part in parts.values()),
            "top_p": sampled(config, task),
            "pad_to": max(getattr(part, "pad_to", 0) for part in parts.values()),
        },
        "optim": {
            "learning_rate": config.optim.learning_rate,
            "weight_decay": config.optim.weight_decay,
            "layer_decay": config.optim.layer_decay,
            "clip_norm": config.optim.clip_norm,
            "policy": POLICIES[schedule.name],
            "warmup_steps": config.optim.warmup_steps,
            "warmup_ratio": config.optim.warmup_ratio,
            "boundaries": schedule.get("boundaries"),
            "end_factor": schedule.get("end_factor"),
            "steps": config.train_steps,
        },
        "batch": {PARTS[part]: size for part, size in config.batch_size.items()},
        "load_from": "ait_det_swinv2b_wodec.pth" if "params" in config.start_from else None,
        "heads": {PARTS[name]: head_of(part) for name, part in parts.items()},
    }
    compare(flatten(ours), set_up)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer(name):
    set_up = SET_UPS[name]
    config, task = built(set_up["ours"])
    part, optim = task.part, config.optim
    ours = {
        "model": {
            "image_size": part.image_size,
            "num_resnet_blocks": part.tokenizer.num_res_blocks,
            "downsample_ratio": part.tokenizer.downsample,
            "num_tokens": part.tokenizer.num_codes,
            "codebook_dim": part.tokenizer.code_dim,
            "hidden_dim": part.tokenizer.hidden,
            "use_norm": part.tokenizer.use_norm,
            "channels": part.tokenizer.channels,
            "train_objective": "classification" if part.tokenizer.objective == vqvae.CLASSIFICATION else "regression",
            "max_value": part.tokenizer.max_value,
            "loss_type": part.tokenizer.objective,
        },
        "optim": {
            "epochs": config.train_steps / config.eval_every,
            "batch_size": only(config.batch_size.values()),
            "learning_rate": optim.learning_rate,
        },
    }
    if part.kind == "maps":
        (data,) = config.data.values()
        ours["optim"] |= {"lr_decay_rate": optim.schedule.factor, "schedule_step": optim.schedule.every}
        ours["optim"]["schedule_type"] = {"exponential": "exp"}[optim.schedule.name]
        ours["data"] = {"mask": part.mask_ratio > 0, "mask_ratio": part.mask_ratio, "mask_patch_size": part.mask_patch}
        ours["data"]["crop_size"] = [data.size] * 2
    else:
        ours["optim"] |= {"warmup_ratio": optim.warmup_ratio, "warmup_steps": optim.warmup_steps}
        ours["optim"] |= {"weight_decay": optim.weight_decay, "schedule_type": optim.schedule.name}
    compare(flatten(ours), set_up)


ADAM = {"optim.b1": 0.9, "optim.b2": 0.999, "optim.eps": 1e-8}
NYU = {"modality": "depth", "size": 480, "color": True, "cutdepth": "published", "columns": ()}
DEPTH = {"eval_crop": (45, 471, 41, 601), "max_depth": 10.0, "memory_weight": None, "input_noise": None}
COCO = {"size": 640, "num_objects": 100, "jitter": (0.1, 3.0), "order": "random", "mask_size": 64}
RARE = {"memory_weight": None, "class_weight": None, "box_weight": None, "early_exit": 0, "top_p": 0.0}
RARE |= {"num_objects": 100, "mask_size": 64}


def named(prefix: str, fields: dict) -> dict:
    return {f"{prefix}.{name}": value for name, value in fields.items()}


SOLVER = ADAM | {"optim.name": "adamw", "ema_decay": 0.0, "accumulate": 1, "task.shared.init_variance": None}
SOLVER |= {"task.shared.transformer.num_tasks": 4, "task.shared.transformer.position_temperature": None}
OBJECTS = SOLVER | {"optim.schedule.end_factor": 0.01, "optim.warmup_ratio": 0.1}
OBJECTS_PART = named("task.parts.instances", RARE) | named("data.instances", COCO)
NYU_SOLVER = SOLVER | named("task.parts.depth", DEPTH | {"flip": True}) | named("data.depth", NYU)
NYU_SOLVER |= {"optim.schedule.factor": 0.1, "task.parts.depth.normalize_image": None}
FIXED = {  # constants that published_setups.json does not have; None is a key that must be left at its default
    "configs/nyu.py": NYU_SOLVER,
    "configs/nyu.py:parallel": NYU_SOLVER,
    "configs/nyu.py:soft=false": NYU_SOLVER,
    "configs/nyu.py:backbone=swin_l": NYU_SOLVER,
    "configs/nyu.py:tokenizer=bins": {
        "task.parts.depth.tokenizer.kind": "bins",
        "task.parts.depth.tokenizer.downsample": 32,
        "task.parts.depth.tokenizer.num_codes": 128,
        "task.parts.depth.tokenizer.max_value": 10.0,
    },
    "configs/coco.py": OBJECTS | OBJECTS_PART,
    "configs/coco.py:soft=false": OBJECTS | OBJECTS_PART,
    "configs/coco.py:task=detection": OBJECTS
    | named("task.parts.detection", RARE)
    | named("data.detection", COCO | {"mask_size": 0}),
    "configs/joint.py": OBJECTS | OBJECTS_PART | named("data.depth", NYU) | named("task.parts.depth", DEPTH),
    "configs/vqvae_depth.py": ADAM
    | named("data.tokenizer", NYU | {"columns": (41, 601)})
    | {
        "optim.name": "adam",
        "optim.clip_norm": 0.0,
        "optim.layer_decay": 1.0,
        "optim.schedule.steps_per_epoch": 24231 // 8,
        "eval_every": 24231 // 8,
        "optim.warmup_steps": 0,
        "optim.weight_decay": 0.0,
        "task.parts.tokenizer.eval_crop": (45, 471, 41, 601),
        "task.parts.tokenizer.tokenizer.restart_threshold": 0.0,
    },
    "configs/vqvae_mask.py": ADAM
    | {
        "optim.name": "adam",
        "optim.clip_norm": 0.0,
        "optim.layer_decay": 1.0,
        "optim.schedule.end_factor": 1e-6 / 3e-4,
        "optim.schedule.lag": 1,
        "eval_every": 849_947 // 512,
        "data.mask_tokenizer.mask_size": 64,
        "task.parts.mask_tokenizer.tokenizer.restart_threshold": 0.0,
    },
}


@pytest.mark.parametrize("ours", FIXED)
def test_constants_that_the_file_does_not_have(ours):
    config, _ = built(ours)
    flat = flatten(config)
    wrong = {name: (flat.get(name), value) for name, value in FIXED[ours].items() if flat.get(name) != value}
    assert not wrong, f"(ours, published): {wrong}"


def test_constants_of_the_code():
    model = vqvae.VQVAE()
    assert (model.decay, model.epsilon, model.commitment_cost) == (0.99, 1e-5, 0.25)
    assert (swin_v2.EPSILON, transformer.EPSILON, layers.INIT_STD) == (1e-6, 1e-5, 0.02)
    assert (EIGEN_CROP, MIN_DEPTH) == ((45, 471, 41, 601), 1e-3)
    assert map_transforms.CUTDEPTH_MAX_DEPTH == 10.0
    assert object_transforms.MIN_SIDE == 1e-2
    assert (object_transforms._DUPLICATE_JITTER, object_transforms._CUT) == (0.1, 2.0)
    assert quantizer.Quantizer(4, 4).decay == model.decay
    assert losses.silog.__kwdefaults__["variance_focus"] == 0.5
    assert metrics.inside(EIGEN_CROP, 480, 640).sum() == (471 - 45) * (601 - 41)


def draws(apply, count: int = 4000) -> np.ndarray:
    """What a random op gives for many seeds."""
    seeds = tf.data.Dataset.range(count).map(lambda i: apply(tf.stack([tf.cast(i, tf.int32), 0])))
    return np.stack(list(seeds.as_numpy_iterator()))


def check_range(numbers: np.ndarray, low: float, high: float) -> None:
    np.testing.assert_allclose([numbers.min(), numbers.max()], [low, high], atol=0.01 * (high - low))


def test_ranges_of_colour(monkeypatch):
    """Contrast and gamma 0.8..1.2, brightness -0.2..0.2, each pair and the gamma with p 1/2."""
    monkeypatch.setattr(map_transforms, "tone_table", lambda *numbers: tf.stack([*numbers, *numbers]))
    monkeypatch.setattr(map_transforms, "shift_hsv", lambda image, shifts: tf.concat([image[:3], shifts], 0))
    places = {"image": np.arange(6)}
    alpha, beta, gamma, *shifts = draws(lambda seed: map_transforms.random_color(places, seed)["image"]).T
    for numbers, low, high, neutral in ((alpha, 0.8, 1.2, 1), (beta, -0.2, 0.2, 0), (gamma, 0.8, 1.2, 1)):
        check_range(numbers, low, high)
        assert np.mean(numbers == neutral) == pytest.approx(0.5, abs=0.03)
    for numbers, largest in zip(shifts, (40, 30, 20), strict=True):
        check_range(numbers, -largest, largest)


def test_share_of_cutdepth(monkeypatch):
    monkeypatch.setattr(map_transforms, "cut_depth", lambda image, *_: image + 1)
    example = {"image": np.zeros(1), "depth": np.zeros(1)}
    assert np.mean(draws(lambda seed: map_transforms.random_cut_depth(example, seed)["image"])) == pytest.approx(
        0.25, abs=0.02
    )


def test_drop_path_rises_linearly_and_norms():
    """Over the blocks of the backbone; constant in the transformer. LayerNorm's epsilon is 1e-6 and 1e-5."""
    rates, epsilons = {}, {}

    def record(call, args, kwargs, context):
        module, path = context.module, "/".join(context.module.path)
        if isinstance(module, layers.DropPath):
            rates.setdefault(path.split("/")[0], []).append(module.rate)
        if isinstance(module, nn.LayerNorm):
            epsilons.setdefault(path.split("/")[0], set()).add(module.epsilon)
        return call(*args, **kwargs)

    solver = tasks.build_solver(
        {
            "backbone": {"embed_dim": 8, "depths": (2, 3), "num_heads": (2, 2), "windows": (2, 2), "drop_path": 0.3}
            | {"pretrain_windows": (2, 2), "use_shift": (True, False)},
            "transformer": {"dim": 8, "num_heads": 2, "encoder_layers": 2, "decoder_layers": 2, "drop_path": 0.1},
        },
        tasks.Vocabulary(),
    )
    with nn.intercept_methods(record):
        jax.eval_shape(solver.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 1), jnp.int32), 0)
    np.testing.assert_allclose(rates["backbone"], np.repeat(np.linspace(0, 0.3, 5), 2))
    assert set(rates["transformer"]) == {0.1}
    assert epsilons == {"backbone": {1e-6}, "transformer": {1e-5}}
