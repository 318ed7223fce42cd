"""Stage 2: one solver for instance segmentation on COCO and depth on NYUv2 (AIT.md section 6.4).

    python -m aitok_jax.main --config=configs/joint.py --workdir=runs/joint \\
        --config.data.instances.root=DATA/coco --config.data.depth.root=DATA/nyu \\
        --config.mask_tokenizer=runs/vqvae_mask --config.depth_tokenizer=runs/vqvae_depth \\
        --config.detection=runs/detection

Arguments, for example `configs/joint.py:soft=false`: backbone=swin_b, soft=true, dtype=auto, remat=none as in
configs/coco.py.

Published: box AP 42.2, mask AP 34.1, RMSE 0.310 with Swin-B, from a detection checkpoint.
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


coco, nyu, vqvae_depth, vqvae_mask = (_sibling(name) for name in ("coco", "nyu", "vqvae_depth", "vqvae_mask"))
STEPS = 302_875


def depth_fields(soft: bool) -> ConfigDict:
    """What depth has of its own: images of 480 pixels padded to 640, a fifth of the loss."""
    return ConfigDict(
        {
            "image_size": 480,
            "pad_to": 640,
            "soft_input": soft,
            "soft_detokenize": soft,
            "aux_weight": 1.0 if soft else 0.0,
            "loss_weight": 0.2,
            "eval_crop": (45, 471, 41, 601),
            "max_depth": 10.0,
            "tokenizer": vqvae_depth.tokenizer_fields(),
        }
    )


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, backbone="swin_b", soft=True, dtype="auto", remat="none")
    if arg.backbone not in nyu.BACKBONES:
        raise ValueError(f"backbone={arg.backbone!r} must be one of {', '.join(nyu.BACKBONES)}")
    depth_variants = {"depth_hard": {"soft_input": False, "soft_detokenize": False}} if arg.soft else {}
    config = ConfigDict(
        {
            "depth_tokenizer": "",  # run directory of configs/vqvae_depth.py
            "mask_tokenizer": "",  # run directory of configs/vqvae_mask.py
            "detection": "",  # run directory of configs/coco.py:task=detection to start from
            "name": "joint",
            "seed": 0,
            "task": {
                "name": "joint",
                "shared": coco.shared_fields(arg, drop_path=0.3),
                "depth": depth_fields(arg.soft),
                "instances": coco.instance_fields(arg.soft),
            },
            "data": {"depth": vqvae_depth.nyu_data("solver"), "instances": vqvae_mask.coco_data()},
            "batch_size": {"depth": 4, "instances": 60},
            "eval_batch_size": {"depth": 8, "instances": 8},
            "train_steps": STEPS,
            "log_every": 50,
            "eval_every": STEPS // 10,
            "checkpoint_every": 1000,
            "keep_checkpoints": 2,
            "best_metric": "instances/mask_ap",
            "best_mode": "max",
            "optim": coco.optimizer(8e-4, 10.0, 12_115),
            "ema_decay": 0.0,
            "fsdp": 1,
            "accumulate": 1,
            "eval_variants": {"depth": depth_variants, "instances": coco.variants(arg.soft)},
            "eval_baseline": False,
        }
    )
    config.start_from = {
        "params": config.get_ref("detection"),
        "model_state/depth_tokenizer": config.get_ref("depth_tokenizer"),
        "model_state/mask_tokenizer": config.get_ref("mask_tokenizer"),
    }
    return config
