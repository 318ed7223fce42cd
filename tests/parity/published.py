"""Builds our modules from the published system's own configuration, as the cases' hyper-parameters give it.

`from_state_dict` gives their variables.
"""

import math
from collections.abc import Mapping

import numpy as np
from flax.traverse_util import unflatten_dict

from aitok_jax.convert import rules
from aitok_jax.models.swin_v2 import SwinV2
from aitok_jax.models.task_solver import TaskSolver
from aitok_jax.models.transformer import TokenTransformer
from aitok_jax.models.vqvae import VQVAE
from aitok_jax.tasks.maps import MapPart
from aitok_jax.tasks.modalities.depth import Depth
from aitok_jax.tasks.objects import ObjectsPart
from aitok_jax.tasks.vocabulary import Vocabulary

OBJECT_WEIGHTS = {"box_weight": "box_weight", "class_weight": "cls_weight", "mask_weight": "mask_weight"}
OBJECT_WEIGHTS |= {"aux_weight": "decoder_loss_weight", "loss_weight": "loss_weight"}
SET_UPS = {  # name of a full-size state dict -> the configuration that builds its model
    "vqvae_depth": ("vqvae_depth", ""),
    "vqvae_insseg": ("vqvae_mask", ""),
    "depth_b": ("nyu", ""),
    "depth_l_parallel": ("nyu", "backbone=swin_l,parallel"),
    "det_b": ("coco", "task=detection"),
    "insseg_b": ("coco", ""),
    "joint_b": ("joint", ""),
}


def from_state_dict(state_dict: Mapping[str, np.ndarray]) -> dict:
    """A published state dict -> {'params': …, 'model_state': …} in our names and layouts, without derived tables."""
    located = {rules.locate(name): array for name, array in state_dict.items()}
    arrays = {path: rules.to_layout(path, np.asarray(array)) for path, array in located.items() if path}
    return {"params": {}, "model_state": {}} | unflatten_dict(arrays)


def tokenizer(cfg: dict) -> VQVAE:
    """The solver's copy of the VQ-VAE: `hidden_dim` is the last width, the largest value is 1."""
    downsample = cfg["mask_size"] // math.isqrt(cfg["token_length"])
    return VQVAE(
        hidden=cfg["hidden_dim"] * 2 // downsample,
        downsample=downsample,
        num_res_blocks=cfg["num_resnet_blocks"],
        num_codes=cfg["num_embeddings"],
        code_dim=cfg["embedding_dim"],
        objective="mse",
        use_norm=cfg.get("use_norm", True),
        max_value=1.0,
        soft_temperature=cfg.get("tau", 1.0),
    )


def backbone(cfg: dict) -> SwinV2:
    return SwinV2(
        embed_dim=cfg["embed_dim"],
        depths=tuple(cfg["depths"]),
        num_heads=tuple(cfg["num_heads"]),
        windows=tuple(cfg["window_size"]),
        pretrain_windows=tuple(cfg["pretrain_window_size"]),
        use_shift=tuple(cfg["use_shift"]),
        drop_path=cfg.get("drop_path_rate", 0.0),
        remat="blocks" if cfg.get("use_checkpoint") else "none",
    )


def vocabulary(cfg: dict) -> Vocabulary:
    codes = (("mask", cfg["num_embeddings"]), ("depth", cfg["num_embeddings_depth"]))
    used = Vocabulary(cfg["num_bins"], cfg["num_classes"], codes)
    return Vocabulary(cfg["num_bins"], cfg["num_classes"], codes, num_spare=cfg["num_vocal"] - used.size)


def transformer(cfg: dict, max_length: int, num_tasks: int) -> TokenTransformer:
    return TokenTransformer(
        dim=cfg["d_model"],
        num_heads=cfg["nhead"],
        hidden=cfg["dim_feedforward"],
        encoder_layers=cfg["num_encoder_layers"],
        decoder_layers=cfg["num_decoder_layers"],
        vocab_size=cfg["num_vocal"],
        max_length=max_length,
        num_tasks=num_tasks,
        parallel=cfg.get("parallel", False),
        drop_path=cfg.get("drop_path", 0.0),
        dropout=cfg.get("drop_out", 0.0),
    )


def solver(model: dict, params: dict) -> TaskSolver:
    tasks, length, _ = params["transformer"]["dec_embed"].shape
    return TaskSolver(backbone(model["backbone"]), transformer(model["transformer"], length, tasks))


def heads_only(vocabulary: Vocabulary) -> TaskSolver:
    """Stands in for the solver where a case has heads alone."""
    return TaskSolver(SwinV2(), TokenTransformer(vocab_size=vocabulary.size))


def depth_part(model: dict, params: dict, image_size: int, **options) -> MapPart:
    cfg, head = model["transformer"], model["task_heads"]["depth"]
    return MapPart(
        modality=Depth(),
        solver=solver(model, params),
        tokenizer=tokenizer(head["vae_cfg"]),
        vocabulary=vocabulary(cfg),
        image_size=image_size,
        pad_to=model["padto"],
        soft_input=cfg["soft_transformer"],
        soft_detokenize=head["soft_vae"],
        aux_weight=head["decoder_loss_weight"],
        loss_weight=head["loss_weight"],
        **options,
    )


def object_weights(head: dict) -> dict[str, float]:
    return {ours: head[theirs] for ours, theirs in OBJECT_WEIGHTS.items() if theirs in head}


def instances_part(model: dict, params: dict, kind: type[ObjectsPart] = ObjectsPart, **options) -> ObjectsPart:
    cfg, head = model["transformer"], model["task_heads"]["insseg"]
    return kind(
        solver=solver(model, params),
        tokenizer=tokenizer(head["vae_cfg"]),
        vocabulary=vocabulary(cfg),
        image_size=head["norm_val"],
        num_objects=head["num_query"],
        mask_size=head["vae_cfg"]["mask_size"],
        soft_input=cfg["soft_transformer"],
        soft_detokenize=cfg["soft_vae"],
        **object_weights(head),
        **options,
    )


def logged_auxiliary(auxiliary: float, weight: float, added: float, theirs: float) -> float:
    """The auxiliary loss as the case logs it: as its total adds it to the cross-entropy, or before it is weighted."""
    weighted = np.isclose(theirs, added, rtol=1e-2)
    assert weighted or np.isclose(weight * theirs, added, rtol=1e-2), "the case contradicts itself"
    return weight * auxiliary if weighted else auxiliary


def window_starts(height: int, width: int, count: int) -> tuple[int, ...]:
    """Of the published test-time windows."""
    return tuple(i * ((width - height) // max(count - 1, 1)) for i in range(count))
