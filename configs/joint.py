"""Stage 2: one solver for instance segmentation on COCO and depth on NYUv2 (arXiv 2301.02229, experiments).

    python -m aitok_jax.main --config=configs/joint.py --workdir=runs/joint \\
        --config.data.instances.root=DATA/coco --config.data.depth.root=DATA/nyu \\
        --config.mask_tokenizer=runs/vqvae_mask --config.depth_tokenizer=runs/vqvae_depth \\
        --config.detection=runs/detection

Arguments, for example `configs/joint.py:soft=false`: backbone=swin_b, soft=true, dtype=auto, remat=none as in
configs/coco.py.

Published: box AP 42.2, mask AP 34.1, RMSE 0.310 with Swin-B, from a detection checkpoint.
"""

from ml_collections import ConfigDict

from configs import coco, common, nyu, vqvae_depth

STEPS = 302_875


def get_config(arg: str | None = None) -> ConfigDict:
    arg = common.arguments(arg, {"backbone": tuple(common.BACKBONES)}, backbone="swin_b", soft=True, **common.COMPUTE)
    depth = nyu.depth_fields(arg.soft, pad_to=coco.SIZE, loss_weight=0.2)
    depth["tokenizer"]["soft_temperature"] = 1.0
    config = common.run(
        depth_tokenizer="",  # run directory of configs/vqvae_depth.py
        mask_tokenizer="",  # run directory of configs/vqvae_mask.py
        detection="",  # run directory of configs/coco.py:task=detection to start from
        name="joint",
        task={
            "name": "solver",
            "shared": coco.shared_fields(arg, num_spare=128),
            "parts": {"depth": depth, "instances": coco.instance_fields(arg.soft)},
        },
        data={"depth": vqvae_depth.nyu_data("solver"), "instances": coco.object_data()},
        batch_size={"depth": 4, "instances": 60},
        eval_batch_size={"depth": 8, "instances": 8},
        train_steps=STEPS,
        eval_every=STEPS // 10,
        best_metric="instances/mask_ap",
        best_mode="max",
        optim=coco.optimizer(8e-4, 10.0, 12_115),
        eval_variants={
            "depth": {"depth_hard": common.HARD} if arg.soft else {},
            "instances": coco.variants(arg.soft),
        },
    )
    config.start_from["params"] = config.get_ref("detection")
    config.start_from["model_state/depth_tokenizer"] = config.get_ref("depth_tokenizer")
    config.start_from["model_state/mask_tokenizer"] = config.get_ref("mask_tokenizer")
    return config
