"""Rematerialisation: what a block keeps for the backward pass, and what it computes again."""

from __future__ import annotations

import flax.linen as nn
import jax

POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "blocks": jax.checkpoint_policies.nothing_saveable,
}
"""By name: keep everything; keep the outputs of linear layers; keep only what goes into a block."""


def policy_name(remat: bool | str) -> str:
    """The policy that a `remat` field names; False and True, as configs had them once, are 'none' and 'blocks'.

    Raises:
        ValueError: there is none of this name.
    """
    name = {False: "none", True: "blocks"}.get(remat, remat)
    if name not in POLICIES:
        raise ValueError(f"remat={remat!r} must be one of {', '.join(POLICIES)}")
    return name


def rematerialized(block: type[nn.Module], remat: bool | str, train_argument: int) -> type[nn.Module]:
    """The class of a block under a policy; names and values of its parameters stay.

    Args:
        block: its `__call__` has `train` as the argument of this number, counted from 1.
    """
    policy = POLICIES[policy_name(remat)]
    return block if policy is None else nn.remat(block, policy=policy, static_argnums=(train_argument,))
