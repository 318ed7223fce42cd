"""Batches from a source: tf.data reads, transforms and batches; the step number is the whole state of the data.

Position p = step * batch_size + slot. Its epoch is p // n, its example the stateless shuffle of p % n keyed by
(seed, epoch), and its augmentation is keyed by (seed, p). In a mixture each source has its slots, and positions of its
own. So the batch of a step is a pure function of (seed, step), on any number of hosts, and resuming is starting at a
step.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from aitok_jax.data import map_transforms, object_transforms
from aitok_jax.data.sources.files import DataError

Batch = dict[str, np.ndarray]
Transform = map_transforms.Transform | object_transforms.HostTransform

_PREFETCH = 2  # batches


class Source(Protocol):
    """Random access to examples on the host.

    Optional: `images` = False where `read` gives no image; `read_readable(index) -> (index used, example)` to go on
    past broken examples; `groups`, lists of indices whose examples have one size, where not all have; `shares`, see
    `mixture.Mixture`.
    """

    names: list[str]

    def __len__(self) -> int: ...

    def fingerprint(self) -> dict[str, Any]:
        """JSON values that change where the examples or their order do."""

    def read(self, index: int) -> dict[str, np.ndarray]:
        """`image` uint8[H,W,3] RGB and the map of the transform's modality; for a HostTransform, what that reads."""


def train_batches(
    source: Source,
    transform: Callable[..., dict[str, Any]],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    shards: int = 1,
) -> Iterator[Batch]:
    """Endless shuffled batches from `start_step` on; this host's share of each.

    Args:
      source: every example is read once an epoch; a broken one is an error, or the next readable one takes its place
        where the source says so (on_error='skip').
      transform: `transform(example, seed)` in TensorFlow ops, which brings all examples to one size; or a
        HostTransform, which runs in Python with a generator made from (seed, position).
      batch_size: examples of all hosts together; host i gets slots [i*B/P, (i+1)*B/P).
      shards: devices of all hosts, a multiple of P. Where they do not divide the batch, it is filled up as `fill_up`
        does it; B is the `full_size`, and slots from batch_size on are not real.

    Returns:
      An iterator of dicts: what the transform gives, batched, with `mask` float32[B/P] = 1 and `id` int32[B/P].
      Arrays may be read-only. The source's own exceptions come out of `next` as they were raised.
    """
    full = full_size(batch_size, shards)
    local = _local_batch(source, full, process_index, process_count)
    real = min(max(batch_size - process_index * local, 0), local)
    read, first_slot = max(real, 1), min(process_index * local, batch_size - 1)
    if start_step < 0:
        raise ValueError(f"start_step={start_step} must not be negative")
    tf = _tensorflow()
    key = seed & 0x7FFFFFFF
    shares = source.shares(batch_size) if hasattr(source, "shares") else [(len(source), batch_size)]
    sizes, own_slots = np.array(shares, np.int64).T
    offsets, slots = np.cumsum(sizes) - sizes, np.cumsum(own_slots) - own_slots

    def place(count):
        position = _position(count, read, batch_size, first_slot)
        slot = position % batch_size
        part = tf.math.count_nonzero(slot >= slots[1:])
        size, share, offset, first = (tf.gather(values, part) for values in (sizes, own_slots, offsets, slots))
        own = position // batch_size * share + slot - first
        epoch = tf.stack([tf.constant(key, tf.int64), own // size])
        index = offset + tf.random.experimental.index_shuffle(own % size, epoch, size - 1)
        return position, index, tf.constant(True)

    counts = tf.data.Dataset.range(start_step * read, np.iinfo(np.int64).max)
    batches = _batches(counts, place, source, transform, key, read, replace_broken=True)
    return batches if full == batch_size else (fill_up(batch, local, real) for batch in batches)


def full_size(batch_size: int, shards: int) -> int:
    """The batch size, or the next that is a multiple of `shards`."""
    return -(-batch_size // shards) * shards


def fill_up(batch: Batch, rows: int, real: int) -> Batch:
    """`rows` rows, the last one repeated, with `weight` float32[rows]: 1 for the first `real`, 0 for those after them.

    Rows of a real example have finite losses, so that what has weight 0 has a gradient of 0.
    """
    filled = {key: values[np.minimum(np.arange(rows), len(values) - 1)] for key, values in batch.items()}
    return filled | {"weight": (np.arange(rows) < real).astype(np.float32)}


def eval_batches(
    source: Source,
    transform: Callable[..., dict[str, Any]],
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every example once, in order; this host's share of each batch.

    A batch has examples of one size; the last of a size is filled up by the first of them with `mask` 0, so that all
    hosts run the same number of steps. A broken example is an error, or has `mask` 0 where the source skips
    (on_error='skip'). Otherwise as `train_batches`.
    """
    local = _local_batch(source, batch_size, process_index, process_count)
    tf = _tensorflow()
    order, given = _eval_order(source, batch_size)

    def place(count):
        position = _position(count, local, batch_size, process_index * local)
        return position, tf.gather(order, position), tf.gather(given, position)

    counts = tf.data.Dataset.range(len(order) // batch_size * local)
    return _batches(counts, place, source, transform, 0, local, replace_broken=False)


def eval_steps(source: Source, batch_size: int) -> int:
    """How many batches `eval_batches` gives."""
    return len(_eval_order(source, batch_size)[0]) // batch_size


def _eval_order(source: Source, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The index at every position, int64, and whether it is a real example, not one that fills up."""
    groups = source.groups() if hasattr(source, "groups") else [range(len(source))]
    rows = [[*group, *[group[0]] * (-len(group) % batch_size)] for group in groups]
    given = [np.arange(len(row)) < len(group) for row, group in zip(rows, groups, strict=True)]
    return np.concatenate(rows).astype(np.int64), np.concatenate(given)


def _batches(counts, place, source, transform, seed, local, *, replace_broken) -> Iterator[Batch]:
    """Turns a dataset of counts into batches; `place(count)` gives (position, index into the source, real)."""
    tf = _tensorflow()
    failures = []
    reading = _host_reading if isinstance(transform, object_transforms.HostTransform) else _tensorflow_reading
    example_at = reading(source, transform, seed, failures)

    def load(count):
        position, index, real = place(count)
        index = tf.cast(index, tf.int32)
        used, example = example_at(position, index)
        used.set_shape([])
        example["id"] = used if replace_broken else index
        example["mask"] = tf.cast(real if replace_broken else real & (used == index), tf.float32)
        return example

    load = tf.autograph.experimental.do_not_convert(load)
    dataset = counts.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    dataset = dataset.batch(local, drop_remainder=True).prefetch(_PREFETCH)
    return _iterate(dataset, failures)


def _host_reading(source, transform, seed, failures):
    """`(position, index) -> (index used, example)` in TensorFlow, where the transform runs in Python too."""
    tf = _tensorflow()
    kinds = [tf.int32, *(tf.as_dtype(dtype) for dtype, _ in transform.spec.values())]

    def arrays(example, name, position):
        transformed = transform(example, np.random.default_rng((seed, position)))
        return [transformed[key] for key in transform.spec]

    read = _reader(source, arrays, failures)

    def example_at(position, index):
        used, *tensors = tf.numpy_function(read, [position, index], kinds)
        example = dict(zip(transform.spec, tensors, strict=True))
        for key, (_, shape) in transform.spec.items():
            example[key].set_shape(shape)
        return used, example

    return example_at


def _tensorflow_reading(source, transform, seed, failures):
    """The same where the transform consists of TensorFlow ops on a map, and on an image where the source has one."""
    tf = _tensorflow()
    images, modality = getattr(source, "images", True), transform.modality
    kinds = [tf.int32, tf.float32, tf.uint8] if images else [tf.int32, tf.float32]
    first = {}

    def arrays(example, name, position):
        height, width = example[modality.name].shape[:2]
        transform.check(height, width, name)
        one_size = not transform.size and not getattr(source, "scale", 0)
        if one_size and first.setdefault("size", (height, width, name))[:2] != (height, width):
            raise DataError(
                f"{name} is {height}x{width} but {first['size'][2]} is {first['size'][0]}x{first['size'][1]}; "
                "examples read at full size must all have one size: set data.fit='scale', or resize the files"
            )
        return [example[modality.name], *([example["image"]] if images else [])]

    read = _reader(source, arrays, failures)

    def example_at(position, index):
        used, map_, *image = tf.numpy_function(read, [position, index], kinds)
        map_.set_shape([None, None, *modality.map_axes])
        example = {modality.name: map_}
        if images:
            image[0].set_shape([None, None, 3])
            example["image"] = image[0]
        return used, dict(transform(example, tf.stack([tf.constant(seed, tf.int32), tf.cast(position, tf.int32)])))

    return example_at


def _reader(source, arrays, failures):
    """`(position, index) -> [index used, *arrays(example, name, position)]`; keeps what it raises in `failures`."""

    def read(position, index):
        try:
            if hasattr(source, "read_readable"):
                used, example = source.read_readable(int(index))
            else:
                used, example = int(index), source.read(int(index))
            return [np.int32(used), *arrays(example, source.names[used], int(position))]
        except Exception as error:
            failures.append((int(position), error))
            raise

    return read


def _iterate(dataset, failures) -> Iterator[Batch]:
    """The dataset's batches; an error of the reader comes out as it was raised there, not as TensorFlow wraps it.

    The TensorFlow iterator goes when the result goes, and at exit while Python still runs: its threads call Python,
    and the process would hang if they outlived the interpreter.
    """
    tf = _tensorflow()
    running = [dataset.as_numpy_iterator()]

    def batches():
        while True:
            try:
                batch = next(running[0])
            except StopIteration:
                return
            except tf.errors.OpError:
                if not failures:
                    raise
                raise min(failures, key=lambda failure: failure[0])[1] from None
            yield batch

    result = batches()
    weakref.finalize(result, running.clear)
    return result


def _position(count, local, batch_size, first_slot):
    """Position among the examples of all hosts of the count-th example of this host."""
    return count // local * batch_size + first_slot + count % local


def _local_batch(source, batch_size, process_index, process_count) -> int:
    if batch_size <= 0 or batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} must be a positive multiple of the {process_count} hosts")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must be in 0..{process_count - 1}")
    if not len(source):
        raise ValueError("the source has no examples; check data.root and its list")
    return batch_size // process_count


def _tensorflow():
    """TensorFlow, kept away from accelerators: they belong to JAX."""
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    tf.config.set_visible_devices([], "TPU")
    return tf
