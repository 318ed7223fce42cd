"""A linear model as a task, for tests of the loop."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from aitok_jax.models import losses

TRACES = []


@dataclasses.dataclass(frozen=True)
class LinePart:
    """Predicts depth = image @ kernel."""

    kind: ClassVar[str] = "maps"
    image_size: int = 4
    noise: float = 0.1
    scale: float = 1.0
    broken_at: int = -1

    def predict(self, params, model_state, batch):
        hidden = jnp.einsum("bhwc,cd->bhwd", batch["image"], params["dense"]["kernel"])
        bias = params["dense"]["bias"].reshape(1, 1, 1, -1)
        return {"depth": self.scale * (hidden + bias).sum(-1)}


@dataclasses.dataclass(frozen=True)
class LineTask:
    """Fits its part; counts its steps in model_state and adds noise from the step's key."""

    name: str
    part: LinePart

    @property
    def parts(self):
        return {self.name: self.part}

    def init(self, rng, batches):
        kernel = 0.1 * jax.random.normal(rng, (batches[self.name]["image"].shape[-1], 8))
        params = {"dense": {"kernel": kernel, "bias": jnp.zeros(8)}}
        return params, {"seen": {"count": jnp.zeros((), jnp.int32)}, "frozen": {"a": jnp.zeros(2), "b": jnp.zeros(2)}}

    def loss(self, params, model_state, batches, rng):
        TRACES.append(self)
        batch, part = batches[self.name], self.part
        count = model_state["seen"]["count"]
        error = part.predict(params, model_state, batch)["depth"] - batch["depth"]
        error = error + part.noise * jax.random.normal(rng, error.shape)
        weight = batch.get("weight")
        loss = losses.mean(error**2, weight) * jnp.where(count + 1 == part.broken_at, jnp.nan, 1.0)
        return loss, ({"error": losses.mean(jnp.abs(error), weight)}, model_state | {"seen": {"count": count + 1}})
