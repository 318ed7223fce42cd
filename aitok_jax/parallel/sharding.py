"""Devices as a mesh of two axes: `data` splits the batch, `fsdp` splits the batch and the large arrays of the state."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")
MIN_SHARDED_BYTES = 2**18  # with 4 MiB, half of Swin-B would stay whole


def make_mesh(fsdp: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices (of all hosts), `fsdp` of them along the second axis.

    Raises:
      ValueError: `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise ValueError(f"fsdp={fsdp} must divide the {len(devices)} devices; use one of {divisors}")
    shape = (len(devices) // fsdp, fsdp)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_batch_size(batch_size: int, mesh: Mesh, name: str = "batch_size", micro_batches: int = 1) -> None:
    """Raises ValueError where the batch cannot be split evenly over the devices, in `micro_batches` on each."""
    parts = mesh.size * micro_batches
    if batch_size < 1 or batch_size % parts:
        below = batch_size // parts * parts
        fits = [str(n) for n in (below, below + parts) if n > 0]
        times = f" times {micro_batches} micro-batches (accumulate)" if micro_batches > 1 else ""
        raise ValueError(
            f"{name}={batch_size} must be divisible by {mesh.size} devices{times}; use {' or '.join(fits)}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """A sharding for every leaf: arrays of 256 KiB and more are split over `fsdp` along their largest divisible
    axis.

    Everything else is replicated. Leaves need `shape` and `dtype`.
    """
    fsdp = mesh.shape["fsdp"]

    def sharding(leaf: Any) -> NamedSharding:
        if fsdp == 1 or leaf.size * leaf.dtype.itemsize < MIN_SHARDED_BYTES:
            return replicated(mesh)
        divisible = [axis for axis, length in enumerate(leaf.shape) if length % fsdp == 0]
        if not divisible:
            return replicated(mesh)
        largest = max(divisible, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, "fsdp"))

    return jax.tree.map(sharding, abstract_state)


def shard_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Puts this process's part of the batch on its devices; entries that are not numeric arrays are left out.

    Raises:
      ValueError: the batch cannot be split evenly over the devices.
    """
    target, placed = batch_sharding(mesh), {}
    for key, value in batch.items():
        if isinstance(value, Mapping):
            placed[key] = shard_batch(value, mesh)
        elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            check_batch_size(len(value) * jax.process_count(), mesh)
            placed[key] = jax.make_array_from_process_local_data(target, value)
    return placed
