"""The published parameter names and layouts, and ours.

Ours are '/'-joined paths into {'params': …, 'model_state': …}; only the layouts of a few leaves differ (`to_layout`).
`locate` and `to_layout` lead from theirs to ours, `publish` and `from_layout` back. Tables that follow from the
configuration (relative positions, sine positions, class weights) and the copies of the transformer under the task heads
have no counterpart; `derived` makes them.
"""

import re
from collections.abc import Iterable

import numpy as np

_DERIVED = re.compile(
    r"relative_(coords_table|position_index)$|(^|\.)enc_embed$|_head\.(transformer|loss_seq)\.|attn_mask$"
)
_TOKENIZER = re.compile(r"^(depth|insseg)_head\.vqvae\.")
_TOKENIZER_NAMES = {"depth": "depth_tokenizer", "insseg": "mask_tokenizer"}
_RENAMED = {"det_embed": "task_embed"}
_WRAPPED = re.compile(r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_DICTIONARY = re.compile(r"^((weights|state_dict|model)\.)+")
_NORM = re.compile(r"norm(_?\d+)?$|_ln$")
_BACKBONE = re.compile(
    r"^(?:backbone\.|encoder\.)?(?=(?:patch_embed|layers|norm\d*|mask_token|absolute_pos_embed)(\.|$))"
)
_NUMBERED = re.compile(r"^(layers|blocks|net|rpe_mlp)_(\d+)$")
_BUFFERS = {"embedding": "_embedding", "cluster_size": "_ema_cluster_size", "ema_w": "_ema_w"}


def locate(name: str) -> tuple[str, ...] | None:
    """A published name -> our path, or None for a derived table.

    >>> locate("backbone.layers.0.blocks.1.attn.qkv.weight")
    ('params', 'backbone', 'layers_0', 'blocks_1', 'attn', 'qkv', 'kernel')
    """
    name = strip(name)
    if _DERIVED.search(name):
        return None
    if match := _TOKENIZER.match(name):
        return ("model_state", _TOKENIZER_NAMES[match[1]], *_locate_leaf(name[match.end() :]))
    return _locate_leaf(name)


def publish(path: tuple[str, ...]) -> str:
    """Our path -> the published name, the inverse of `locate`.

    >>> publish(("params", "backbone", "layers_0", "blocks_1", "attn", "qkv", "kernel"))
    'backbone.layers.0.blocks.1.attn.qkv.weight'

    Raises:
      ValueError: the published modules have no such part.
    """
    root, *rest = path
    for head, tokenizer in _TOKENIZER_NAMES.items():
        if root == "model_state" and rest[0] == tokenizer:
            return f"{head}_head.vqvae.{publish(tuple(rest[1:]))}"
    if root == "model_state" and rest[:2] == ["codebook", "quantizer"]:
        return f"_vq_vae.{_BUFFERS[rest[2]]}"
    if root != "params" or rest[0] == "quantizer":
        raise ValueError(f"{'/'.join(path)} has no published name: batch norm and learned codebooks were not published")
    *modules, leaf = (_NUMBERED.sub(r"\1.\2", part) for part in rest)
    if modules[0] in ("encoder", "decoder"):
        modules[1] = modules[1].removeprefix("layers.")
    renamed = {ours: theirs for theirs, ours in _RENAMED.items()} | {"kernel": "weight", "scale": "weight"}
    return ".".join((*modules, renamed.get(leaf, leaf)))


def strip(name: str) -> str:
    """A name without what PyTorch's wrappers of modules put into it and without the dictionaries around it.

    >>> strip("state_dict.model._orig_mod.module.backbone._orig_mod.norm3.bias")
    'backbone.norm3.bias'
    """
    return _DICTIONARY.sub("", _WRAPPED.sub("", name))


def canonical(names: Iterable[str]) -> dict[str, str]:
    """Name in a file -> published name: see `strip`, and with 'backbone.' before the parts of a Swin-V2 alone.

    Pretraining (SimMIM) writes those under 'encoder.' or without a prefix, and calls the last LayerNorm 'norm'.

    >>> canonical(["module.encoder.layers.3.blocks.1.norm1.bias", "module.encoder.norm.bias"])
    ... # doctest: +NORMALIZE_WHITESPACE
    {'module.encoder.layers.3.blocks.1.norm1.bias': 'backbone.layers.3.blocks.1.norm1.bias',
     'module.encoder.norm.bias': 'backbone.norm3.bias'}
    """
    plain = {name: _BACKBONE.sub("backbone.", strip(name)) for name in names}
    stages = [int(match[1]) for name in plain.values() if (match := re.match(r"backbone\.layers\.(\d+)\.", name))]
    last = f"backbone.norm{max(stages, default=0)}."
    if any(published.startswith(last) for published in plain.values()):
        return plain
    return {name: re.sub(r"^backbone\.norm\.", last, published) for name, published in plain.items()}


def _locate_leaf(name: str) -> tuple[str, ...]:
    if ".running_" in name or name.endswith("num_batches_tracked") or name == "_vq_vae._embedding.weight":
        raise ValueError(f"{name}: no published weights have batch norm or a learned codebook, so they are not read")
    for ours, theirs in _BUFFERS.items():
        if name == f"_vq_vae.{theirs}":
            return ("model_state", "codebook", "quantizer", ours)
    name = re.sub(r"\.(\d+)(?=\.)", r"_\1", re.sub(r"^(encoder|decoder)\.(\d+)\.", r"\1.layers.\2.", name))
    *modules, leaf = name.split(".")
    if leaf == "weight" and modules:
        leaf = "scale" if _is_norm(modules[-1]) else "kernel"
    return ("params", *modules, _RENAMED.get(leaf, leaf))


def _is_norm(module: str) -> bool:
    return bool(_NORM.search(module))


def to_layout(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """A published array (torch layout) -> the layout of our leaf at `path`.

    Linear [out,in] -> [in,out]; convolution OIHW -> HWIO; transposed convolution IOHW -> HWIO; tables lose their axes
    of length 1.
    """
    leaf = path[-1]
    if leaf == "kernel" and array.ndim == 2:
        return array.T
    if leaf == "kernel" and array.ndim == 4:
        return array.transpose(2, 3, 0, 1) if _is_transposed(path, array) else array.transpose(2, 3, 1, 0)
    if leaf in ("logit_scale", "mask_embed"):
        return array.reshape(-1)
    if leaf == "task_embed":
        return array.reshape(array.shape[0], -1)
    return array


def from_layout(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """An array of ours at `path` -> the published layout, the inverse of `to_layout`."""
    leaf = path[-1]
    if leaf == "kernel" and array.ndim == 2:
        return array.T
    if leaf == "kernel" and array.ndim == 4:
        swapped = array.transpose(2, 3, 0, 1)
        return swapped if _is_transposed(path, swapped) else array.transpose(3, 2, 0, 1)
    if leaf == "logit_scale":
        return array.reshape(-1, 1, 1)
    if leaf == "mask_embed":
        return array.reshape(1, 1, -1)
    if leaf == "task_embed":
        return array[:, None]
    return array


def _is_transposed(path: tuple[str, ...], array: np.ndarray) -> bool:
    return path[-3] == "decoder" and path[-2].startswith("layers_") and array.shape[2:] == (4, 4)
