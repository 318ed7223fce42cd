"""Stage 2: depth on NYUv2 with the task solver (arXiv 2301.02229, experiments).

    python -m aitok_jax.main --config=configs/nyu.py --workdir=runs/nyu --config.data.root=DATA/nyu \\
        --config.tokenizer=runs/vqvae_depth [--config.backbone=RUN_WITH_A_BACKBONE]

Arguments, for example `configs/nyu.py:backbone=swin_l,parallel`:
    backbone=swin_b    or swin_l
    parallel           AiT-P: all tokens in one pass
    soft=true          false: none of the three soft-token uses ("w/o soft")
    tokenizer=vqvae    or bins, the comparison of the paper's appendix B
    dtype=auto, remat=none    see configs/common.py

Published on the 654 test images (RMSE / δ1 / abs_rel):
    swin_b 0.305/0.934/0.087   swin_b,parallel 0.301/0.940/0.085   swin_b,soft=false 0.318/0.932/0.089
    swin_l 0.284/0.949/0.079   swin_l,parallel 0.275/0.954/0.076
"""

from ml_collections import ConfigDict

from aitok_jax.tasks.modalities.depth import EIGEN_CROP
from configs import common, vqvae_depth

BINS = {"kind": "bins", "downsample": 32, "num_codes": 128, "max_value": 10.0}
CHOICES = {"backbone": tuple(common.BACKBONES), "tokenizer": ("vqvae", "bins")}


def depth_fields(soft: bool, **fields) -> dict:
    """What depth has of its own. Without soft tokens their temperature has no part."""
    return {
        "image_size": vqvae_depth.SIZE,
        "soft_input": soft,
        "soft_detokenize": soft,
        "aux_weight": 1.0 if soft else 0.0,
        "eval_crop": EIGEN_CROP,
        "max_depth": 10.0,
        "tokenizer": vqvae_depth.tokenizer_fields(soft_temperature=0.8 if soft else 1.0),
        **fields,
    }


def get_config(arg: str | None = None) -> ConfigDict:
    defaults = {"backbone": "swin_b", "parallel": False, "soft": True, "tokenizer": "vqvae"}
    arg = common.arguments(arg, CHOICES, **defaults, **common.COMPUTE)
    shift = (True, True, False, False)
    compute = {name: arg[name] for name in common.COMPUTE}
    own = {"flip": True, "soft_input": arg.soft and not arg.parallel} | (
        {"tokenizer": BINS} if arg.tokenizer == "bins" else {}
    )
    config = common.run(
        tokenizer="",  # run directory of configs/vqvae_depth.py
        backbone="",  # run directory whose backbone to start from; '' starts from random weights
        name="depth",
        task={
            "name": "depth",
            **depth_fields(arg.soft, **own),
            **common.solver(arg.backbone, shift=shift, drop_path=0.1, parallel=arg.parallel, **compute),
        },
        data=vqvae_depth.nyu_data("solver"),
        batch_size=24,
        train_steps=25250,
        eval_every=5050,
        checkpoint_every=1010,
        best_metric="depth/rmse",
        optim=common.optimizer(
            learning_rate=common.BACKBONES[arg.backbone]["learning_rate"],
            weight_decay=common.BACKBONES[arg.backbone]["weight_decay"],
            layer_decay=0.9,
            clip_norm=10.0,
            warmup_steps=500,
            warmup_ratio=0.1,
            schedule={"name": "step", "boundaries": (18180,), "factor": 0.1},
        ),
        eval_variants={"depth_hard": common.HARD} if arg.soft else {},
    )
    config.start_from["params/backbone"] = config.get_ref("backbone")
    if arg.tokenizer == "vqvae":
        config.start_from["model_state/depth_tokenizer"] = config.get_ref("tokenizer")
    return config
