"""Stage 2: depth on NYUv2 with the task solver (AIT.md sections 4-7).

    python -m aitok_jax.main --config=configs/nyu.py --workdir=runs/nyu --config.data.root=DATA/nyu \\
        --config.tokenizer=runs/vqvae_depth [--config.backbone=RUN_WITH_A_BACKBONE]

Arguments, for example `configs/nyu.py:backbone=swin_l,parallel`:
    backbone=swin_b    or swin_l
    parallel           AiT-P: all tokens in one pass
    soft=true          false: none of the three soft-token uses ("w/o soft")
    dtype=auto         bfloat16 arithmetic on accelerators, float32 on a CPU; or float32, bfloat16. Softmax, LayerNorm,
                       losses, tokenizers and all parameters are float32 always
    remat=none         or blocks, recomputed in the backward pass: less memory, a third more time; or dots, which
                       keeps the outputs of linear layers: less of both
    tokenizer=vqvae    or bins, the comparison of the paper's appendix B

Published on the 654 test images (RMSE / δ1 / abs_rel):
    swin_b 0.305/0.934/0.087   swin_b,parallel 0.301/0.940/0.085   swin_b,soft=false 0.318/0.932/0.089
    swin_l 0.284/0.949/0.079   swin_l,parallel 0.275/0.954/0.076
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from aitok_jax.config import parse_arg


def _sibling(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


vqvae_depth = _sibling("vqvae_depth")

BACKBONES = {
    "swin_b": {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "learning_rate": 2e-4, "weight_decay": 0.05},
    "swin_l": {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "learning_rate": 1e-4, "weight_decay": 0.075},
}


def task_fields(arg: ConfigDict, size: int = 480) -> ConfigDict:
    """The fields of `DepthTask` for the published Swin-V2 backbones."""
    backbone = BACKBONES[arg.backbone]
    if arg.tokenizer == "bins":
        tokenizer = {"kind": "bins", "downsample": 32, "num_codes": 128, "max_value": 10.0}
    else:
        tokenizer = vqvae_depth.tokenizer_fields()
    return ConfigDict(
        {
            "name": "depth",
            "image_size": size,
            "soft_input": arg.soft and not arg.parallel,
            "soft_detokenize": arg.soft,
            "aux_weight": 1.0 if arg.soft else 0.0,
            "flip": True,
            "eval_crop": (45, 471, 41, 601),
            "max_depth": 10.0,
            "tokenizer": tokenizer,
            "backbone": {
                "embed_dim": backbone["embed_dim"],
                "depths": (2, 2, 18, 2),
                "num_heads": backbone["num_heads"],
                "windows": (30, 30, 30, 15),
                "pretrain_windows": (12, 12, 12, 6),
                "use_shift": (True, True, False, False),
                "drop_path": 0.1,
                "remat": arg.remat,
                "dtype": arg.dtype,
            },
            "transformer": {
                "dim": 256,
                "num_heads": 8,
                "hidden": 1024,
                "encoder_layers": 6,
                "decoder_layers": 6,
                "max_length": 2100,
                "num_tasks": 4,
                "parallel": arg.parallel,
                "drop_path": 0.1,
                "dropout": 0.1,
                "remat": arg.remat,
                "dtype": arg.dtype,
            },
        }
    )


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, backbone="swin_b", parallel=False, soft=True, dtype="auto", remat="none", tokenizer="vqvae")
    for name, valid in {"backbone": tuple(BACKBONES), "tokenizer": ("vqvae", "bins")}.items():
        if arg[name] not in valid:
            raise ValueError(f"{name}={arg[name]!r} must be one of {', '.join(valid)}")
    backbone = BACKBONES[arg.backbone]
    config = ConfigDict(
        {
            "tokenizer": "",  # run directory of configs/vqvae_depth.py
            "backbone": "",  # run directory whose backbone to start from; '' starts from random weights
            "name": "depth",
            "seed": 0,
            "task": task_fields(arg),
            "data": vqvae_depth.nyu_data("solver"),
            "batch_size": 24,
            "eval_batch_size": 8,
            "train_steps": 25250,
            "log_every": 50,
            "eval_every": 5050,
            "checkpoint_every": 1010,
            "keep_checkpoints": 2,
            "best_metric": "depth/rmse",
            "best_mode": "min",
            "optim": {
                "name": "adamw",
                "learning_rate": backbone["learning_rate"],
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": backbone["weight_decay"],
                "layer_decay": 0.9,
                "clip_norm": 10.0,
                "warmup_steps": 500,
                "warmup_ratio": 0.1,
                "schedule": {"name": "step", "boundaries": (18180,), "factor": 0.1},
            },
            "ema_decay": 0.0,
            "fsdp": 1,
            "accumulate": 1,
            "eval_variants": {"depth_hard": {"soft_input": False, "soft_detokenize": False}} if arg.soft else {},
            "eval_baseline": False,
        }
    )
    config.start_from = {"params/backbone": config.get_ref("backbone")}
    if arg.tokenizer == "vqvae":
        config.start_from["model_state/depth_tokenizer"] = config.get_ref("tokenizer")
    return config
