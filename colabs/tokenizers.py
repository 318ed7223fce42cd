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
# # The tokenizers by themselves
#
# A depth map is a grid of tokens, each one of 128 codes; so is a mask. This notebook takes maps to tokens and back,
# looks at what a code stands for, and at what lies *between* two codes: the soft tokens that the method is named
# after.
#
# The next cell installs the package where it is missing. The notebook runs on a CPU.

# %%
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from PIL import Image

from aitok_jax import DepthTokenizer, MaskTokenizer
from aitok_jax.data import scenes
from aitok_jax.data.object_transforms import crop_masks
from aitok_jax.tasks.modalities.depth import Depth
from aitok_jax.tokenizers import parse_text, write_text
from aitok_jax.visualize import map_panel


def show(picture):
    display(Image.fromarray(picture), include=["image/jpeg"])


# %% [markdown]
# ## Depth to tokens and back
#
# `builtin` names the small tokenizers that come with the package. Published ones load by their file name:
# `DepthTokenizer.load("vae-final.pt")`, `MaskTokenizer.load("vae-oid.npz")`.

# %%
tokenizer = DepthTokenizer.load("builtin")
scene = scenes.render(1_000_005, 128, 128)
ids = tokenizer.encode(scene.depth)  # float32[H,W] metres -> int32[T], row by row
rows, columns = tokenizer.grid(*scene.depth.shape)
print(f"{scene.depth.size} pixels -> {ids.size} tokens of {tokenizer.num_codes} codes:")
print(ids.reshape(rows, columns))

# %%
decoded = tokenizer.decode(ids)
show(map_panel(Depth(), scene.image, decoded, truth=scene.depth))

# %% [markdown]
# ## What a code stands for
#
# The map of a grid that is filled with one code, for a few of the codes, from near to far. A code is a distance, and
# a shape within its patch.

# %%
constant = tokenizer.decode(np.repeat(np.arange(tokenizer.num_codes)[:, None], 9, axis=1))  # [128, 48, 48]
order = np.argsort(constant.mean((1, 2)))
shown = order[:: len(order) // 16][:16]
fig, places = plt.subplots(2, 8, figsize=(10, 2.9), layout="constrained")
for axes, code in zip(places.ravel(), shown, strict=True):
    drawn = axes.imshow(constant[code], vmin=0, vmax=8, cmap="turbo")
    axes.set_title(f"{code}: {constant[code].mean():.1f} m", fontsize=8)
    axes.axis("off")
fig.colorbar(drawn, ax=places, label="m")
plt.show()

# %% [markdown]
# ## Soft tokens: between two codes
#
# A solver is rarely sure of one code. *Hard* decoding takes the likeliest; *soft* decoding takes the
# probability-weighted mean of the code vectors. Here a token wavers between a near and a far code: the hard depth
# jumps at one half, the soft depth goes over smoothly. This is what the task's loss is differentiated through in
# training.

# %%
near, far = order[len(order) // 4], order[-len(order) // 8]
weights = np.linspace(0, 1, 21)
probabilities = np.zeros((len(weights), 9, tokenizer.num_codes), np.float32)
probabilities[:, :, near] = 1 - weights[:, None]
probabilities[:, :, far] = weights[:, None]
soft = tokenizer.decode_soft(probabilities).mean((1, 2))
hard = tokenizer.decode(probabilities.argmax(-1)).mean((1, 2))
fig, axes = plt.subplots(figsize=(5, 2.8), layout="constrained")
axes.plot(weights, soft, label="soft")
axes.step(weights, hard, where="mid", label="hard")
axes.set(xlabel=f"probability of code {far} (the rest: code {near})", ylabel="mean depth (m)")
axes.legend()
plt.show()

# %% [markdown]
# ## Masks
#
# A mask is cropped at its box and resized to a square of `tokenizer.size` pixels, 16 for the built-in tokenizer and
# 64 for the published one, before it is encoded. Above: the crops, below: what their tokens decode to.

# %%
masks = MaskTokenizer.load("builtin")
count = len(scene.boxes)
crops = crop_masks(scene.masks.astype(np.uint8), scene.boxes, np.arange(count), masks.size)
mask_ids = masks.encode(crops)
back = masks.decode(mask_ids)
fig, places = plt.subplots(2, count, figsize=(1.3 * count, 2.9), layout="constrained", squeeze=False)
for i in range(count):
    places[0, i].imshow(crops[i], vmin=0, vmax=1, cmap="gray")
    places[0, i].set_title(scenes.CLASSES[scene.classes[i]], fontsize=8)
    places[1, i].imshow(back[i], vmin=0, vmax=1, cmap="gray")
    places[1, i].set_title(" ".join(map(str, mask_ids[i])), fontsize=8)
for axes in places.ravel():
    axes.axis("off")
plt.show()
overlap = ((back > 0.5) & (crops > 0)).sum((1, 2)) / ((back > 0.5) | (crops > 0)).sum((1, 2))
print(f"mean IoU of crop and decoded crop: {overlap.mean():.2f}")

# %% [markdown]
# ## Tokens in the text of a language model
#
# PaliGemma speaks of objects as four `<locNNNN>` for the box and sixteen `<segNNN>` for the mask, the codes of its
# mask tokenizer `vae-oid.npz`. `write_text` and `parse_text` go both ways; with that file loaded,
# `masks.decode(found["ids"])` is the object's mask.

# %%
text = write_text(scene.boxes[0], range(16), *scene.depth.shape, label=scenes.CLASSES[scene.classes[0]])
print(text)
for found in parse_text(text, *scene.depth.shape):
    print(found)
