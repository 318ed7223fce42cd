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
# # Predict depth and objects
#
# One solver, two tasks: it looks at an image and predicts *tokens*, for its depth map or for its objects, which small
# decoders turn into metres, boxes and masks. The weights used here come with the package. They were trained on
# built-in scenes, furnished rooms from a small ray caster, at 64×64 pixels: good for trying things out, not for
# photographs. Yours go in the same call (last section).
#
# The next cell installs the package where it is missing. Two CPU cores are enough.

# %%
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from PIL import Image

from aitok_jax import Predictor
from aitok_jax.data import scenes
from aitok_jax.image import read_image
from aitok_jax.predict import pointcloud
from aitok_jax.tasks.modalities.depth import Depth
from aitok_jax.visualize import map_panel, objects_panel


def show(picture):
    display(Image.fromarray(picture), include=["image/jpeg"])


# %% [markdown]
# ## Load

# %%
predictor = Predictor.load("builtin")  # or the directory of a run, or of converted weights
print("does:", ", ".join(predictor.tasks))
print("knows:", ", ".join(category["name"] for category in predictor.categories))

# %% [markdown]
# ## An image
#
# A room that was not trained on, larger than the model's 64×64. The image is resized on the way in, the result on the
# way out. Change `SEED` for another room, or give `PHOTO` a file of your own.

# %%
SEED, PHOTO = 1_000_005, None

scene = scenes.render(SEED, 384, 384)
image = scene.image if PHOTO is None else read_image(PHOTO)  # uint8[H,W,3] RGB
truth = scene.depth if PHOTO is None else None

# %% [markdown]
# ## Depth
#
# `depth` is in metres and `confidence` in 0..1, both float32 at the image's size. A token stands for a patch of
# depths; the solver gives each of the 128 codes a probability, and the confidence is 1 / (1 + the spread in metres of
# what these codes stand for).

# %%
result = predictor(image, task="depth")
show(map_panel(Depth(), image, result["depth"], truth=truth, confidence=result["confidence"]))

# %% [markdown]
# ## Objects
#
# The same weights, asked for another task. Boxes are x1 y1 x2 y2 in pixels of the image, masks boolean at its size,
# best object first. `min_score` leaves out what the model itself thinks little of.

# %%
objects = predictor(image, task="instances", min_score=0.3)
names = [category["name"] for category in predictor.categories]
known = {"boxes": scene.boxes, "classes": scene.classes, "masks": scene.masks} if PHOTO is None else None
show(objects_panel(image, *(objects[key] for key in ("boxes", "classes", "scores", "masks")), names, truth=known))

# %% [markdown]
# ## Many images, and how good it is
#
# A list of images gives a list of results; those of one size go through the model together. `augment=True` averages
# depth over the mirror image and enlarged corners.

# %%
unseen = [scenes.render(2_000_000 + i, 64, 64) for i in range(24)]
images = [one.image for one in unseen]


def rmse(results):
    squares = [np.mean((result["depth"] - one.depth) ** 2) for result, one in zip(results, unseen, strict=True)]
    return np.mean(np.sqrt(squares))


plain = predictor(images, task="depth", batch_size=8)
augmented = predictor(images, task="depth", augment=True, batch_size=8)
print(f"RMSE over {len(unseen)} rooms: {rmse(plain):.3f} m; with augment: {rmse(augmented):.3f} m")

# %% [markdown]
# Is the confidence worth something? Sort the pixels by it: those the model is surest of should have the smallest
# error.

# %%
confidence = np.concatenate([one["confidence"].ravel() for one in plain])
error = np.concatenate([np.abs(one["depth"] - s.depth).ravel() for one, s in zip(plain, unseen, strict=True)])
tenths = np.array_split(np.argsort(-confidence), 10)
fig, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
axes.bar(range(10, 101, 10), [error[part].mean() for part in tenths], width=8)
axes.set(xlabel="pixels by confidence, surest tenth first (%)", ylabel="mean error (m)")
plt.show()

# %% [markdown]
# ## In space
#
# With the camera's field of view, depth becomes a coloured point cloud. The rooms' camera sees 60° in a 4:3 image,
# which leaves 46.8° for a square one. `pointcloud.write_ply` writes the same points to a file for MeshLab, Blender or
# CloudCompare.

# %%
FOV = 46.8  # degrees, horizontal
step = 6
xyz = pointcloud.points(result["depth"][::step, ::step], FOV)
colors = image[::step, ::step].reshape(-1, 3) / 255
fig = plt.figure(figsize=(5, 4))
axes = fig.add_subplot(projection="3d")
axes.scatter(xyz[:, 0], xyz[:, 2], -xyz[:, 1], c=colors, s=3)
axes.set(xlabel="right (m)", ylabel="forward (m)", zlabel="up (m)")
axes.view_init(elev=25, azim=-110)
plt.show()
pointcloud.write_ply("runs/room.ply", image, result["depth"], FOV)

# %% [markdown]
# ## Other weights
#
# `Predictor.load("runs/nyu")` takes any run directory of a solver. Published weights become such a directory by
# `python -m aitok_jax.convert FILE DIRECTORY --config=configs/nyu.py`, and all cells above work with it. The command
# `python -m aitok_jax.predict --checkpoint=… --image FOLDER --out=…` does the same for whole folders.
