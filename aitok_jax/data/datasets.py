"""The data of a run: sources to train and evaluate on, with their transforms, from `config.data`."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from aitok_jax import paths
from aitok_jax.config import check_given, field_types, unknown
from aitok_jax.data import map_transforms, object_transforms
from aitok_jax.data.pipeline import Source, Transform
from aitok_jax.data.sources import coco, mixture, nyu, prepared
from aitok_jax.data.sources.files import DataError
from aitok_jax.tasks.modalities import MODALITIES, Modality

RECIPES, FITS = ("tokenizer", "solver"), ("crop", "scale")
_COMMON = dict.fromkeys(("name", "root", "on_error", "also_root"), str)
_COMMON |= {"cache": bool, **dict.fromkeys(("expected_train", "expected_test", "also_count"), int)}
_COMMON["render"] = {**dict.fromkeys(("train", "test", "height", "width", "seed", "workers"), int), "format": str}
_MAPS = dict.fromkeys(
    ("modality", "train_list", "test_list", "train_subfolder", "test_subfolder", "recipe", "fit"), str
)
_MAPS |= {"size": int, "columns": tuple[int, ...], "color": bool, "cutdepth": str}
_FILE_FIELDS = {key: name for name, modality in MODALITIES.items() for key in modality.file_fields}
_MAPS |= {key: field_types(MODALITIES[name])[MODALITIES[name].file_fields[key]] for key, name in _FILE_FIELDS.items()}
_OBJECTS = dict.fromkeys(("train_images", "test_images", "train_annotations", "test_annotations", "order"), str)
_OBJECTS |= {"mask_size": int, "size": int, "num_objects": int, "jitter": tuple[float, float]}
KEYS = {"nyu": _COMMON | _MAPS, "coco": _COMMON | _OBJECTS}
KEYS["coco_masks"] = KEYS["coco"]
"""What `config.data` may have, by its name: key -> type, see `config.typed`."""
_UNUSED = {  # by recipe or name
    "tokenizer": ("color", "cutdepth"),
    "solver": ("columns",),
    "coco_masks": ("size", "num_objects", "jitter", "order"),
}


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


def build(config: Any, modality: Modality | None = None) -> Data:
    """Sources and transforms of a run from `config.data`.

    `modality` is what the model takes the maps for; None is one with the default fields.

    Keys of all: name, root, on_error, cache, expected_train, expected_test (examples; 0 = any), render ({} or the
    arguments of `scenes.ensure`: train, test, height, width, seed, format); also_root and also_count: that many
    training examples of every batch are of the data there, laid out in the same way, 0 = none.
    'nyu': modality (which maps), what its `file_fields` has, such as depth_scale (values a metre in depth files; 0:
    1000 of whole numbers, 1 of floats), train_list, test_list ('' = look through the folder), train_subfolder,
    test_subfolder, size (crop side), fit (what is done first: 'crop' nothing, as published, where frames must have the
    model's short side; 'scale' brings frames of any size to it, as prediction does), recipe ('tokenizer' | 'solver'),
    columns, color, cutdepth.
    'coco': train_images, test_images (folders), train_annotations, test_annotations (JSONs; all relative to root),
    size (input side), num_objects, mask_size (0 = boxes only), jitter (low, high), order (object_transforms.ORDERS).
    'coco_masks': folders and JSONs as 'coco', mask_size.

    Where root (or root/NAME/VERSION) is prepared data, of `aitok_jax.data.prepare` or TFDS's `nyu_depth_v2`, that is
    read, with the same batches as from the raw folders; folders and JSONs were chosen in preparing and are not looked
    at, and lists or render are an error.
    """
    builders = {"nyu": functools.partial(_nyu, modality), "coco": _coco, "coco_masks": _coco_masks}
    check_given("config.data", config, ["name"])
    if config.name not in builders:
        raise ValueError(
            f"data.name={config.name!r} must be 'nyu' (NYUv2, or any folder in its layout), 'coco' (images with an "
            "instances JSON) or 'coco_masks' (the masks of one)"
        )
    for key in config:
        if key not in KEYS[config.name]:
            raise ValueError(f"config.data.{key}: {unknown(key, KEYS[config.name])}")
    _check_complete(config)
    data = builders[config.name](config)
    if count := config.also_count:
        changes = {"root": config.also_root, "expected_train": 0, "expected_test": 0, "render": {}}
        if config.name == "nyu" and _find(config, config.also_root):
            changes |= {"train_list": "", "test_list": ""}
        also = builders[config.name](ConfigDict({**config, **changes}))
        data = dataclasses.replace(data, train=mixture.Mixture(data.train, also.train, count))
    return data


def _check_complete(config: Any) -> None:
    """ValueError for a missing key; what the kind of data, or prepared data, leaves unused may be missing."""
    check_given("config.data", config, ["root", *(("modality", "recipe") if config.name == "nyu" else ())])
    unused = [*_UNUSED.get(config.recipe if config.name == "nyu" else config.name, ())]
    unused += [key for key, modality in _FILE_FIELDS.items() if config.name == "nyu" and modality != config.modality]
    of_folders = ("train_", "test_", "render") if _prepared(config) else ()
    check_given("config.data", config, [key for key in KEYS[config.name] if not key.startswith((*unused, *of_folders))])
    if not of_folders and config.render:
        check_given("config.data.render", config.render, ("train", "test", "height", "width"))


def _nyu(described: Modality | None, config: Any) -> Data:
    if config.recipe not in RECIPES:
        raise ValueError(f"data.recipe={config.recipe!r} must be one of {RECIPES}")
    if config.modality not in MODALITIES:
        raise ValueError(f"data.modality: {unknown(config.modality, MODALITIES)}")
    if config.fit not in FITS:
        raise ValueError(f"data.fit={config.fit!r} must be one of {FITS}")
    options = _file_options(config)
    same = isinstance(described, MODALITIES[config.modality])
    modality = dataclasses.replace(described, **options) if same else MODALITIES[config.modality](**options)
    if config.recipe == "tokenizer":
        train_transform = map_transforms.tokenizer_train(modality, config.size, tuple(config.columns))
    else:
        train_transform = map_transforms.solver_train(modality, config.size, config.color, config.cutdepth)
    eval_transform = map_transforms.evaluation(modality, config.size if config.recipe == "solver" else 0)
    train_images, counts = config.recipe != "tokenizer", (config.expected_train, config.expected_test)
    scale = config.size if config.fit == "scale" else 0
    options = {"on_error": config.on_error, "cache": config.cache, "scale": scale}
    if folder := _prepared(config):
        train, test = prepared.nyu_sources(folder, train_images=train_images, counts=counts, **options)
        _check_same(folder, train.modality, modality)
        return Data(train, test, train_transform, eval_transform)
    _render(config)
    source = functools.partial(nyu.NyuSource, modality, config.root, **options)
    train = source(
        config.train_list, subfolder=config.train_subfolder, images=train_images, expected_count=config.expected_train
    )
    test = source(config.test_list, subfolder=config.test_subfolder, expected_count=config.expected_test)
    return Data(train, test, train_transform, eval_transform)


def _check_same(folder: Path, found: Modality, wanted: Modality) -> None:
    """DataError where the data says fields of its maps that are others than the model's."""
    for name in prepared.told_fields(folder):
        if (theirs := getattr(found, name)) != (ours := getattr(wanted, name)):
            raise DataError(f"{folder} has {name}={theirs!r:.200}, but the model {ours!r:.200}; give both the same")


def _file_options(config: Any) -> dict[str, Any]:
    """The fields of the modality that are set; 0 is not set."""
    found, own = {}, MODALITIES[config.modality].file_fields
    for key, name in _FILE_FIELDS.items():
        if key not in config or not (value := config[key]):
            continue
        if key not in own:
            raise ValueError(
                f"data.{key}={value} is for {name}, not for data.modality={config.modality!r}; set it to 0"
            )
        found[own[key]] = value
    return found


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
    if folder := _prepared(config):
        source = functools.partial(prepared.PreparedCoco, folder, **options)
        places = ("train",), ("test",)
    else:
        _render(config, format="coco")
        root, source = paths.expand(config.root), functools.partial(coco.CocoSource, **options)
        places = (
            (paths.inside(root, config.train_images), paths.inside(root, config.train_annotations)),
            (paths.inside(root, config.test_images), paths.inside(root, config.test_annotations)),
        )
    trained = source(*places[0], with_objects=True, expected_count=expected_train)
    tested = source(*places[1], expected_count=expected_test)
    if (trained.category_ids, trained.categories) != (tested.category_ids, tested.categories):
        raise DataError(
            f"{trained.path} lists {len(trained.categories)} categories and {tested.path} {len(tested.categories)}, "
            "not the same ones; class numbers would differ: give both the same list"
        )
    return trained, tested


def _prepared(config: Any) -> Path | None:
    """The folder of prepared data, where root has some."""
    folder = _find(config, config.root)
    keys = ("train_list", "test_list", "render", *_FILE_FIELDS)
    chosen = [key for key in keys if key in config] if folder else []
    for key in chosen:
        if config[key]:
            raise ValueError(
                f"data.{key} has no effect on the prepared data in {folder}; choose in preparing, or "
                "set data.root to the raw folder"
            )
    return folder


def _find(config: Any, root: str) -> Path | None:
    """Prepared data of the configuration's kind."""
    return prepared.find(paths.expand(root), prepared.kind_of(config.modality) if config.name == "nyu" else "coco")


def _render(config: Any, **defaults: Any) -> None:
    """Makes the built-in scenes, where asked for."""
    if config.render:
        from aitok_jax.data import scenes

        scenes.ensure(paths.expand(config.root), **{"workers": os.cpu_count() or 1, **defaults, **config.render})
