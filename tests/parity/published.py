"""Builds our modules from the published system's own configuration, as the cases' hyper-parameters give it."""

import math

from aitok_jax.models.swin_v2 import SwinV2
from aitok_jax.models.task_solver import TaskSolver
from aitok_jax.models.transformer import TokenTransformer
from aitok_jax.models.vqvae import VQVAE
from aitok_jax.tasks.depth import DepthTask
from aitok_jax.tasks.vocabulary import Vocabulary


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
        remat=cfg.get("use_checkpoint", False),
    )


def vocabulary(cfg: dict) -> Vocabulary:
    sizes = (cfg["num_bins"], cfg["num_classes"], cfg["num_embeddings"], cfg["num_embeddings_depth"])
    return Vocabulary(*sizes, num_spare=cfg["num_vocal"] - Vocabulary(*sizes).size)


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


def depth_task(model: dict, params: dict, image_size: int, **options) -> DepthTask:
    cfg, head = model["transformer"], model["task_heads"]["depth"]
    tasks, length, _ = params["transformer"]["dec_embed"].shape
    return DepthTask(
        solver=TaskSolver(backbone(model["backbone"]), transformer(cfg, length, tasks)),
        tokenizer=tokenizer(head["vae_cfg"]),
        vocabulary=vocabulary(cfg),
        image_size=image_size,
        soft_input=cfg["soft_transformer"],
        soft_detokenize=head["soft_vae"],
        aux_weight=head["decoder_loss_weight"],
        loss_weight=head["loss_weight"],
        **options,
    )
