# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train a small solver, and see what soft tokens are worth
#
# Trains a depth solver on built-in scenes for a few minutes, on two CPU cores. As the published solver starts from a
# pretrained backbone and a finished tokenizer, this one starts from those that come with the package; its transformer
# starts from nothing. Then the same weights decode with soft and with hard tokens.
#
# The next cell installs the package where it is missing.

# %%
import dataclasses
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from PIL import Image

from aitok_jax import Predictor, tasks
from aitok_jax.config import ordered
from aitok_jax.data import scenes
from aitok_jax.tasks.modalities.depth import Depth
from aitok_jax.training import checkpoint, loop
from aitok_jax.visualize import map_panel


def show(picture):
    display(Image.fromarray(picture), include=["image/jpeg"])


# %% [markdown]
# ## A configuration
#
# A run is a `ConfigDict` with everything in it. `configs/quickstart.py` in the repository builds this one; here is
# the built-in model's own, changed where we want another run: depth alone, all tokens in one pass, fewer scenes and
# steps.

# %%
STEPS, SCENES = 300, 1000

base = checkpoint.load_inference("builtin")[0].to_dict()
task = {**base["task"]["shared"], **base["task"]["parts"]["depth"], "name": "depth"}
task |= {"soft_input": False, "input_noise": 0.0}
task["transformer"]["parallel"] = True
data = {**base["data"]["depth"], "root": "runs/tiny_scenes"}
data["render"] |= {"train": SCENES, "test": 100}

changed = {"name": "tiny", "task": task, "data": data, "batch_size": 8, "eval_batch_size": 50, "train_steps": STEPS}
config = ordered({**base, **changed})
config.checkpoint_every, config.optim.warmup_steps, config.ema_decay = 100, 50, 0.98
config.start_from = {
    "params/backbone": "builtin",
    "model_state/depth_tokenizer": "builtin",  # frozen: its codes are what the solver shall predict
}
config.eval_variants = {"hard": {"soft_detokenize": False}}

# %% [markdown]
# ## Train
#
# Renders the scenes, trains, and evaluates: with soft tokens (`tiny/…`), with hard ones (`hard/…`), and, to compare,
# the mean depth map of the training set (`baseline/…`). Interrupted, the same cell goes on from the last checkpoint.

# %%
metrics = loop.train(config.lock(), "runs/tiny")

# %%
lines = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
curve = [(line["step"], line["loss"]) for line in lines if "loss" in line]
fig, axes = plt.subplots(figsize=(5, 2.5), layout="constrained")
axes.plot(*zip(*curve, strict=True))
axes.set(xlabel="step", ylabel="training loss")
plt.show()

# %% [markdown]
# ## Soft against hard
#
# The same weights. Soft tokens say what lies between codes that are about equally likely, so they win most where the
# solver is unsure; after more training the gap narrows.

# %%
for name, label in {"tiny": "soft tokens", "hard": "hard tokens", "baseline": "mean map"}.items():
    print(f"{label:12} RMSE {metrics[f'{name}/rmse']:.3f} m   δ1 {metrics[f'{name}/d1']:.3f}")

# %%
_, weights = checkpoint.load_inference("runs/tiny")
soft_task = tasks.build(config.task)
hard_part = dataclasses.replace(soft_task.parts["depth"], soft_detokenize=False)
hard_task = dataclasses.replace(soft_task, parts={"depth": hard_part})
soft, hard = (Predictor(task, weights["params"], weights["model_state"]) for task in (soft_task, hard_task))

rooms = [scenes.render(1_000_000 + i, 64, 64) for i in range(2)]
panels = []
for room in rooms:
    for name, predictor in {"soft": soft, "hard": hard}.items():
        depth = predictor(room.image)["depth"]
        panels.append(map_panel(Depth(), room.image, depth, truth=room.depth, title=name))
show(np.concatenate(panels))

# %% [markdown]
# ## Next
#
# - More `STEPS` and `SCENES`; `parallel` False and `soft_input` True for a token at a time.
# - `python -m aitok_jax.main --config=configs/quickstart.py --workdir=runs/quickstart` trains everything, tokenizers
#   and objects too, in 22 minutes.
# - `configs/nyu.py` and `configs/coco.py` are the published set-ups.
