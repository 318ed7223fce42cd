"""Everything a training run carries from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """The state of a run; a pytree.

    Attributes:
      step: updates made so far, i32 scalar.
      params: what the optimizer trains, nested dicts of arrays.
      ema_params: exponential moving average of `params`, or None where `ema_decay` is 0.
      model_state: what gradients do not train: codebook statistics of a tokenizer, the frozen tokenizer of a solver.
      opt_state: optax state.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    model_state: Any
    opt_state: Any

    @classmethod
    def create(
        cls, params: Any, model_state: Any, optimizer: optax.GradientTransformation, ema_decay: float = 0.0
    ) -> "TrainState":
        """The state before the first update; the moving average starts at `params`."""
        ema_params = jax.tree.map(jnp.copy, params) if ema_decay else None
        return cls(jnp.zeros((), jnp.int32), params, ema_params, model_state, optimizer.init(params))

    def apply_gradients(
        self, grads: Any, model_state: Any, optimizer: optax.GradientTransformation, ema_decay: float = 0.0
    ) -> "TrainState":
        """One update; the moving average becomes decay * average + (1 - decay) * new parameters.

        The decay of the n-th update is at most n / (n + 9), so that the average forgets the start: after 140 updates at
        a constant 0.999 it would still hold 87 % of it.
        """
        updates, opt_state = optimizer.update(grads, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        ema_params = self.ema_params
        if ema_decay:
            share = jnp.maximum(1.0 - ema_decay, 9.0 / (self.step + 10.0))
            ema_params = jax.tree.map(lambda e, p: e + share.astype(e.dtype) * (p - e), ema_params, params)
        return TrainState(self.step + 1, params, ema_params, model_state, opt_state)

    @property
    def inference_params(self) -> Any:
        """What evaluation and prediction use: the moving average where there is one."""
        return self.params if self.ema_params is None else self.ema_params
