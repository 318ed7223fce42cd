"""Batches from a source: tf.data reads, transforms and batches; the step number is the whole state of the data.

Position p = step * batch_size + slot. Its epoch is p // n, its example the stateless shuffle of p % n keyed by
(seed, epoch), and its augmentation is keyed by (seed, p). In a mixture each source has its slots, and positions of its
own. So the batch of a step is a pure function of (seed, step), on any number of hosts, and resuming is starting at a
step.
"""

import dataclasses
import functools
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from aitok_jax.data import map_transforms, object_transforms
from aitok_jax.data.sources import coco, mixture, nyu, prepared

Batch = dict[str, np.ndarray]
Transform = map_transforms.Transform | object_transforms.HostTransform

RECIPES = ("tokenizer", "solver")
_PREFETCH = 2  # batches


class Source(Protocol):
    """Random access to examples on the host.

    Optional: `images` = False where `read` gives no image; `read_readable(index) -> (index used, example)` to go on
    past broken examples; `shares`, see `mixture.Mixture`.
    """

    names: list[str]

    def __len__(self) -> int: ...

    def fingerprint(self) -> dict[str, Any]:
        """JSON values that change where the examples or their order do."""

    def read(self, index: int) -> dict[str, np.ndarray]:
        """`image` uint8[H,W,3] RGB and `depth` float32[H,W] metres; for a HostTransform, what that reads."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads: sources to train and evaluate on, with their transforms."""

    train: Source
    eval: Source
    train_transform: Transform
    eval_transform: Transform

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """What must stay the same for a run to go on: numbers of examples, and hashes of names and annotations."""
        return {"train": self.train.fingerprint(), "eval": self.eval.fingerprint()}


def train_batches(
    source: Source,
    transform: Callable[..., dict[str, Any]],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Endless shuffled batches from `start_step` on; this host's share of each.

    Args:
      source: every example is read once an epoch; a broken one is an error, or the next readable one takes its place
        where the source says so (on_error='skip').
      transform: `transform(example, seed)` in TensorFlow ops, which brings all examples to one size; or a
        HostTransform, which runs in Python with a generator made from (seed, position).
      batch_size: examples of all hosts together; host i gets slots [i*B/P, (i+1)*B/P).

    Returns:
      An iterator of dicts: what the transform gives, batched, with `mask` float32[B/P] = 1 and `id` int32[B/P].
      Arrays may be read-only. The source's own exceptions come out of `next` as they were raised.
    """
    local = _local_batch(source, batch_size, process_index, process_count)
    if start_step < 0:
        raise ValueError(f"start_step={start_step} must not be negative")
    tf = _tensorflow()
    key = seed & 0x7FFFFFFF
    shares = source.shares(batch_size) if hasattr(source, "shares") else [(len(source), batch_size)]
    sizes, own_slots = np.array(shares, np.int64).T
    offsets, slots = np.cumsum(sizes) - sizes, np.cumsum(own_slots) - own_slots

    def place(count):
        position = _position(count, local, batch_size, process_index)
        slot = position % batch_size
        part = tf.math.count_nonzero(slot >= slots[1:])
        size, share, offset, first = (tf.gather(values, part) for values in (sizes, own_slots, offsets, slots))
        own = position // batch_size * share + slot - first
        epoch = tf.stack([tf.constant(key, tf.int64), own // size])
        index = offset + tf.random.experimental.index_shuffle(own % size, epoch, size - 1)
        return position, index, tf.constant(True)

    counts = tf.data.Dataset.range(start_step * local, np.iinfo(np.int64).max)
    return _batches(counts, place, source, transform, key, local, replace_broken=True)


def eval_batches(
    source: Source,
    transform: Callable[..., dict[str, Any]],
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every example once, in order; this host's share of each batch.

    The last batch is filled up by example 0 with `mask` 0, so that all hosts run the same number of steps. A broken
    example is an error, or has `mask` 0 where the source skips (on_error='skip'). Otherwise as `train_batches`.
    """
    local = _local_batch(source, batch_size, process_index, process_count)
    tf = _tensorflow()

    def place(count):
        position = _position(count, local, batch_size, process_index)
        real = position < len(source)
        return position, tf.where(real, position, 0), real

    counts = tf.data.Dataset.range(-(-len(source) // batch_size) * local)
    return _batches(counts, place, source, transform, 0, local, replace_broken=False)


def build(config: Any) -> Data:
    """Sources and transforms of a run from `config.data`.

    Keys of all: name, root, on_error, cache, expected_train, expected_test (examples; 0 = any), render ({} or the
    arguments of `scenes.ensure`: train, test, height, width, seed, format); also_root and also_count: that many
    training examples of every batch are of the data there, laid out in the same way, 0 = none.
    'nyu': train_list, test_list ('' = look through the folder), train_subfolder, test_subfolder, size (crop side),
    recipe ('tokenizer' | 'solver'), columns, color, cutdepth.
    'coco': train_images, test_images (folders), train_annotations, test_annotations (JSONs; all relative to root),
    size (input side), num_objects, mask_size (0 = boxes only), jitter (low, high), order (object_transforms.ORDERS).
    'coco_masks': folders and JSONs as 'coco', mask_size.

    Where root (or root/NAME/VERSION) is prepared data, of `aitok_jax.data.prepare` or TFDS's `nyu_depth_v2`, that is
    read, with the same batches as from the raw folders; folders and JSONs were chosen in preparing and are not looked
    at, and lists or render are an error.
    """
    builders = {"nyu": _nyu, "coco": _coco, "coco_masks": _coco_masks}
    if config.name not in builders:
        raise ValueError(
            f"data.name={config.name!r} must be 'nyu' (NYUv2, or any folder in its layout), 'coco' (images with an "
            "instances JSON) or 'coco_masks' (the masks of one)"
        )
    data = builders[config.name](config)
    if count := config.get("also_count", 0):
        changes = {"root": config.also_root, "expected_train": 0, "expected_test": 0, "render": {}}
        if config.name == "nyu" and prepared.find(config.also_root, "nyu"):
            changes |= {"train_list": "", "test_list": ""}
        also = builders[config.name](ConfigDict({**config, **changes}))
        data = dataclasses.replace(data, train=mixture.Mixture(data.train, also.train, count))
    return data


def _nyu(config: Any) -> Data:
    if config.recipe not in RECIPES:
        raise ValueError(f"data.recipe={config.recipe!r} must be one of {RECIPES}")
    if config.recipe == "tokenizer":
        train_transform = map_transforms.tokenizer_train(config.size, tuple(config.columns))
    else:
        train_transform = map_transforms.solver_train(config.size, config.color, config.cutdepth)
    if folder := _prepared(config, "nyu"):
        train, test = prepared.nyu_sources(
            folder,
            train_images=config.recipe != "tokenizer",
            counts=(config.expected_train, config.expected_test),
            on_error=config.on_error,
            cache=config.cache,
        )
        return Data(train, test, train_transform, map_transforms.evaluation())
    _render(config)
    source = functools.partial(nyu.NyuSource, config.root, on_error=config.on_error, cache=config.cache)
    train = source(
        config.train_list,
        subfolder=config.train_subfolder,
        images=config.recipe != "tokenizer",
        expected_count=config.expected_train,
    )
    test = source(config.test_list, subfolder=config.test_subfolder, expected_count=config.expected_test)
    return Data(train, test, train_transform, map_transforms.evaluation())


def _coco(config: Any) -> Data:
    train_transform = object_transforms.training(
        config.size, config.num_objects, config.mask_size, tuple(config.jitter), config.order
    )
    counts = config.expected_train, config.expected_test
    train, test = _coco_sources(config, *counts, masks=config.mask_size > 0, cache=config.cache)
    return Data(train, test, train_transform, object_transforms.evaluation(config.size))


def _coco_masks(config: Any) -> Data:
    sources = _coco_sources(config)
    train, test = (
        coco.MaskSource(source, size=config.mask_size, cache=config.cache, expected_count=count)
        for source, count in zip(sources, (config.expected_train, config.expected_test), strict=True)
    )
    transform = functools.partial(object_transforms.instance, config.mask_size)
    return Data(train, test, transform(train=True), transform(train=False))


def _coco_sources(
    config: Any, expected_train: int = 0, expected_test: int = 0, **options: Any
) -> tuple[coco.CocoSource, coco.CocoSource]:
    """The sources to train and to evaluate on, which must have the same categories."""
    options["on_error"] = config.on_error
    if folder := _prepared(config, "coco"):
        source = functools.partial(prepared.PreparedCoco, folder, **options)
        places = ("train",), ("test",)
    else:
        _render(config, format="coco")
        root, source = Path(config.root), functools.partial(coco.CocoSource, **options)
        places = (
            (root / config.train_images, root / config.train_annotations),
            (root / config.test_images, root / config.test_annotations),
        )
    trained = source(*places[0], with_objects=True, expected_count=expected_train)
    tested = source(*places[1], expected_count=expected_test)
    if (trained.category_ids, trained.categories) != (tested.category_ids, tested.categories):
        raise nyu.DataError(
            f"{trained.path} lists {len(trained.categories)} categories and {tested.path} {len(tested.categories)}, "
            "not the same ones; class numbers would differ: give both the same list"
        )
    return trained, tested


def _prepared(config: Any, kind: str) -> Path | None:
    """The folder of prepared data, where root has some."""
    folder = prepared.find(config.root, kind)
    for key in ("train_list", "test_list", "render") if folder else ():
        if config.get(key):
            raise ValueError(
                f"data.{key} has no effect on the prepared data in {folder}; choose in preparing, or "
                "set data.root to the raw folder"
            )
    return folder


def _render(config: Any, **defaults: Any) -> None:
    """Makes the built-in scenes, where asked for."""
    if config.render:
        from aitok_jax.data import scenes

        scenes.ensure(config.root, **{"workers": os.cpu_count() or 1, **defaults, **config.render})


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
    """The same where the transform consists of TensorFlow ops on depth, and on an image where the source has one."""
    tf = _tensorflow()
    images = getattr(source, "images", True)
    kinds = [tf.int32, tf.float32, tf.uint8] if images else [tf.int32, tf.float32]
    check = getattr(transform, "check", None)
    keeps_size = not getattr(transform, "size", 0)
    first = {}

    def arrays(example, name, position):
        height, width = example["depth"].shape
        if check is not None:
            check(height, width, name)
        if keeps_size and first.setdefault("size", (height, width, name))[:2] != (height, width):
            raise nyu.DataError(
                f"{name} is {height}x{width} but {first['size'][2]} is {first['size'][0]}x{first['size'][1]}; "
                "examples read at full size must all have one size: resize the files"
            )
        return [example["depth"], example["image"]] if images else [example["depth"]]

    read = _reader(source, arrays, failures)

    def example_at(position, index):
        used, depth, *image = tf.numpy_function(read, [position, index], kinds)
        depth.set_shape([None, None])
        example = {"depth": depth}
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


def _position(count, local, batch_size, process_index):
    """Position among the examples of all hosts of the count-th example of this host."""
    return count // local * batch_size + process_index * local + count % local


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
