"""Sources of prepared data: those of the raw folders, read from TFRecords.

`python -m aitok_jax.data.prepare` writes the encoded files as they are, in the order of the raw source, so that names,
examples and categories are the same, and so are the batches. Beside dataset_info.json of TFDS lie, for each split,
`manifest_SPLIT.jsonl` (name and SHA-256 of every file, in the order of the records), for COCO `instances_SPLIT.json`
(the annotations, masks as run-length codes), and `prepared.json`, written last.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from aitok_jax import paths
from aitok_jax.config import build_dataclass
from aitok_jax.data.sources import coco
from aitok_jax.data.sources.files import DataError, File, decode_image
from aitok_jax.data.sources.pairs import PairSource
from aitok_jax.data.sources.records import Records, read_info
from aitok_jax.tasks.modalities import MODALITIES, Modality
from aitok_jax.tasks.modalities.depth import Depth

MODALITY = Depth()
"""Of the maps of NYU and TFDS_NYU; the data sets of others have their names."""
LAST = "prepared.json"
NYU, COCO, TFDS_NYU = "nyu_pairs", "coco_instances", "nyu_depth_v2"
_NAMES = {"nyu": (NYU, TFDS_NYU), "coco": (COCO,)}


def kind_of(modality: str) -> str:
    """The kind of prepared data, of `find`, whose maps are of a modality."""
    return "nyu" if modality == MODALITY.name else modality


def name_of(kind: str) -> str:
    """The data set of a kind that is prepared here."""
    return _names(kind)[0]


def _names(kind: str) -> tuple[str, ...]:
    return _NAMES.get(kind, (f"{kind}_pairs",))


def find(root: str | Path, kind: str) -> Path | None:
    """The folder of prepared data of a kind at `root`, or at `root`/NAME/VERSION as TFDS lays it out.

    Kinds are 'nyu' (images with depth), 'coco', and modalities but for depth.
    None where there is none. ValueError where `root` is of another kind, or holds several data sets of this one.
    """
    root = paths.expand(root)
    if (root / "dataset_info.json").is_file():
        name = read_info(root).get("name")
        if name not in _names(kind):
            raise ValueError(f"{root} holds the prepared data {name!r}, but needed is {' or '.join(_names(kind))}")
        return root
    found = sorted(path.parent for name in _names(kind) for path in root.glob(f"{name}/*/dataset_info.json"))
    if len(found) > 1:
        raise ValueError(
            f"{root} holds several prepared data sets: set data.root to one of {', '.join(map(str, found))}"
        )
    return found[0] if found else None


def nyu_sources(folder: Path, *, train_images: bool, counts: tuple[int, int], **options: Any) -> list[PairSource]:
    """The sources to train and to evaluate on; `counts` are those expected of each, 0 = any.

    Args:
      train_images: False never decodes the training images.
      **options: on_error, cache and scale, as in `nyu.NyuSource`.
    """
    name = read_info(folder)["name"]
    make, test = (TfdsNyu, "validation") if name == TFDS_NYU else (PreparedNyu, "test")
    parts = zip(("train", test), (train_images, True), counts, strict=True)
    return [make(folder, split, images=images, expected_count=count, **options) for split, images, count in parts]


def described(folder: Path) -> Modality:
    """What the maps of prepared data are."""
    description = _description(folder)
    if name := description.get("modality"):
        return build_dataclass(MODALITIES[name], description["fields"])
    return Depth(file_scale=description.get("depth_scale", 0.0))


def told_fields(folder: Path) -> list[str]:
    """The fields of the modality, but for those of its files, that the data says."""
    told = {} if read_info(folder)["name"] == TFDS_NYU else _description(folder)
    files = MODALITIES[told["modality"]].file_fields.values() if "modality" in told else ()
    return [name for name in told.get("fields", {}) if name not in files]


class PreparedNyu(PairSource):
    """Pairs as `nyu.NyuSource` gives them, from `prepare nyu`, `scenes` or `folder`."""

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        on_error: str = "raise",
        cache: bool = False,
        images: bool = True,
        expected_count: int = 0,
        scale: int = 0,
    ):
        super().__init__(self._modality(folder), on_error, cache=cache, images=images, scale=scale)
        self._records = Records(folder, split, on_error)
        self.names = self._read_names(folder, split)
        if expected_count and len(self.names) != expected_count:
            raise DataError(
                f"{folder}: {len(self.names)} pairs in {split}, but expected_count={expected_count}; prepare the "
                "published data, or set the expected count to 0"
            )

    def _modality(self, folder: Path) -> Modality:
        return described(folder)

    def _read_names(self, folder: Path, split: str) -> list[str]:
        return _manifest_names(folder, split, self._records)

    def _file(self, index: int, kind: str) -> File:
        return _file(self._records, index, kind, self.names[index])


class TfdsNyu(PreparedNyu):
    """TFDS's own `nyu_depth_v2` as its users have prepared it: 47584 frames to train and 654 to test.

    Depth is rounded to 16-bit floats there (up to 4 mm at 10 m). Names are 'SPLIT/NUMBER', in the order of the records.
    """

    def _modality(self, folder: Path) -> Depth:
        return MODALITY

    def _read_names(self, folder: Path, split: str) -> list[str]:
        return [f"{split}/{index:05}" for index in range(len(self._records))]

    def _decoded(self, index: int) -> dict[str, np.ndarray]:
        features = _features(self._records, index)
        values = features["depth"].float_list.value
        image = decode_image(File(self._records.name(index), features["image"].bytes_list.value[0]))
        if len(values) != image.shape[0] * image.shape[1]:
            raise DataError(
                f"{self._records.name(index)}: {len(values)} depths for an image of {image.shape[:2]} pixels"
            )
        depth = np.fromiter(values, np.float32, len(values)).reshape(image.shape[:2])
        return {"depth": depth, "image": image} if self.images else {"depth": depth}


class PreparedCoco(coco.CocoSource):
    """Images with objects as `coco.CocoSource` gives them (same options), from `prepare coco`, `scenes` or `folder`."""

    def __init__(self, folder: Path, split: str, **options: Any):
        super().__init__(folder, folder / f"instances_{split}.json", **options)
        self._records = Records(folder, split, self.on_error)
        places = {name: i for i, name in enumerate(_manifest_names(folder, split, self._records))}
        if missing := [name for name in self.names if name not in places]:
            raise DataError(
                f"{self.path} lists {missing[0]}, which {folder} does not hold; they were not prepared together: "
                "prepare the data again"
            )
        self._places = [places[name] for name in self.names]
        self._digest = _description(folder)["annotations"][split]  # of the JSON that the data was prepared from

    def _file(self, index: int) -> File:
        return _file(self._records, self._places[index], "image", self.names[index])


def _description(folder: Path) -> dict[str, Any]:
    path = folder / LAST
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing file; the data was not prepared to the end or not copied whole")
    return json.loads(paths.read(path))


def read_manifest(folder: Path, split: str) -> list[dict[str, str]]:
    """Name and SHA-256 of the files of every example."""
    path = folder / f"manifest_{split}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing file; the data was not prepared to the end or not copied whole")
    return [json.loads(line) for line in paths.read(path).splitlines()]


def _manifest_names(folder: Path, split: str, records: Records) -> list[str]:
    names = [entry["name"] for entry in read_manifest(folder, split)]
    if len(names) != len(records):
        raise DataError(f"{folder}: {len(records)} records in {split} but {len(names)} names; prepare the data again")
    return names


def _file(records: Records, index: int, kind: str, name: str) -> File:
    """An encoded file of a record; DataError where the record is not that of `name`."""
    features = _features(records, index)
    label = f"{name} in {records.name(index)}"
    if features["name"].bytes_list.value != [name.encode()]:
        raise DataError(f"{label}: the record is of {features['name'].bytes_list.value}; prepare the data again")
    return File(label, features[kind].bytes_list.value[0])


def _features(records: Records, index: int) -> Any:
    """The features of a record by name (tf.train.Feature)."""
    import tensorflow as tf

    return tf.train.Example.FromString(records.read(index)).features.feature
