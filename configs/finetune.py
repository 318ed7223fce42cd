"""A model for your own images, from weights that are there.

    python -m aitok_jax.main --config=configs/finetune.py:depth --workdir=runs/mine --config.data.root=my_frames
    python -m aitok_jax.main --config=configs/finetune.py:instances --workdir=runs/mine --config.data.root=my_photos

Arguments: what to predict (depth, normals, semantic, or another dense map; instances, detection), then, for example
`configs/finetune.py:depth,size=128`:
    from=builtin    or a run directory of a solver, or converted published weights
    size=0          side of the images that the model sees, in pixels; 0: that of the weights

The folder holds images with maps of the same names, pairs in the layout of NYUv2, images with an instances JSON, or
prepared data; see `aitok_jax/data/own.py`. It is divided into images to train and to evaluate on, and what the model
does is measured before the first step and after the last. `--dry_run` says what is found and will be done, and for how
long.
"""

from ml_collections import ConfigDict

from aitok_jax.config import ordered, parse_arg
from aitok_jax.tasks.modalities import MODALITIES
from aitok_jax.training.finetune import OBJECTS

TASKS = (*MODALITIES, *OBJECTS)


def get_config(arg: str | None = None) -> ConfigDict:
    values = parse_arg(arg, **dict.fromkeys(TASKS, False), **{"size": 0, "from": "builtin"})
    chosen = [name for name in TASKS if values[name]]
    if len(chosen) != 1:
        raise ValueError(f"say what to predict, one of {', '.join(TASKS)}, as in configs/finetune.py:{TASKS[0]}")
    return ordered(
        {
            "finetune": {"task": chosen[0], "size": values.size, "from": values["from"]},
            "data": {
                "root": "",  # the folder
                "maps": "",  # folder of the maps, where they are elsewhere
                "annotations": "",  # the instances JSON, where there are several
                "val": "",  # folder in root to evaluate on; root/train.txt and val.txt may list names
                "share": 0.15,  # of the images to evaluate on, where nothing else says it
                "depth_scale": 0.0,  # values a metre in depth files; 0: 1000 of whole numbers, 1 of floats
                "first_label": 0,  # of semantic maps, whose classes classes.txt names; 1 where 0 is none, as in ADE20K
                "on_error": "raise",  # or skip
            },
            "steps": 0,  # of each stage; 0: what suits the amount of data
            "batch_size": 0,  # 0: 16
            "learning_rate": 0.0,  # 0: 5e-4 for maps, 1e-3 for objects
            "seed": 0,
        }
    )
