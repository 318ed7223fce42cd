"""NYUv2 and folders in its layout: `<scene>/rgb_NNNNN.jpg` with `sync_depth_NNNNN.png`, or another modality's maps."""

from pathlib import Path

from absl import logging

from aitok_jax import paths
from aitok_jax.data.sources.files import DataError, File, read_file
from aitok_jax.data.sources.pairs import PairSource
from aitok_jax.tasks.modalities import Modality

TRAIN_COUNT, TEST_COUNT = 24231, 654  # pairs of the published lists
_PREFIX = "rgb_"


class NyuSource(PairSource):
    """Random access to pairs of an RGB image and a map in a folder in the layout of NYUv2.

    Args:
      modality: what the maps are; its `pair` names their files.
      root: the data folder.
      list_file: a text file (absolute, or relative to `root`) with one pair a line, as in `/scene/rgb_x.jpg
        /scene/sync_depth_x.png`, paths relative to `root/subfolder`, with tabs between them where names have spaces;
        further columns (a focal length) are ignored.
        '' looks for `rgb_*.jpg` (or another image) under `root/subfolder` instead, sorted, leaving out
        `official_splits` of `root`; the map may have any of the modality's suffixes.
      subfolder: the folder inside `root` that the pairs are relative to ('official_splits/test' for the test part).
      on_error: 'raise' refuses a broken example; 'skip' lets `read_readable` (and so the pipeline) go on without it.
      cache: keep decoded examples in memory (about 2.2 MB for a 640x480 pair).
      images: False reads maps only and never opens an image.
      expected_count: the number of pairs that there must be (24231 and 654 for the published lists); 0 = any.
      scale: see `PairSource`.

    Attributes:
      names: list[str], the path of each image relative to `root/subfolder`.
      skipped: set[str], names left out so far because they are broken (on_error='skip').

    Raises:
      FileNotFoundError: no such folder or list.
      DataError: an empty folder or list, a malformed line, or another count than expected.
    """

    def __init__(
        self,
        modality: Modality,
        root: str | Path,
        list_file: str = "",
        *,
        subfolder: str = "",
        on_error: str = "raise",
        cache: bool = False,
        images: bool = True,
        expected_count: int = 0,
        scale: int = 0,
    ):
        super().__init__(modality, on_error, cache=cache, images=images, scale=scale)
        self._folder = paths.expand(root) / subfolder
        if not self._folder.is_dir():
            raise FileNotFoundError(
                f"{self._folder}: no such data folder; set data.root (and the subfolder) to the folder of the scenes"
            )
        origin = paths.inside(paths.expand(root), list_file) if list_file else self._folder
        pairs = self._from_list(origin) if list_file else self._from_folder(leave_out_test=not subfolder)
        if not pairs:
            raise DataError(
                f"{origin}: no pairs found; "
                + ("the list is empty" if list_file else f"expected <scene>/rgb_*.jpg with {modality.pair.format('*')}")
            )
        if expected_count and len(pairs) != expected_count:
            raise DataError(
                f"{origin}: {len(pairs)} pairs, but expected_count={expected_count}; use the published list files "
                f"({TRAIN_COUNT} pairs to train, {TEST_COUNT} to test), or set the expected count to 0"
            )
        self.names = [image for image, _ in pairs]
        self._map_names = [map_name for _, map_name in pairs]

    def paths(self, index: int) -> dict[str, Path]:
        """Where the 'image' and, by the modality's name, the map of an example are."""
        names = {"image": self.names[index], self.modality.name: self._map_names[index]}
        return {kind: paths.inside(self._folder, name) for kind, name in names.items()}

    def _file(self, index: int, kind: str) -> File:
        return read_file(self.paths(index)[kind])

    def _from_list(self, path: Path) -> list[tuple[str, str]]:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such list file; give its absolute path, or one relative to data.root")
        pairs = []
        for number, line in enumerate(paths.read_lines(path), 1):
            columns = line.split("\t" if "\t" in line else None)
            if len(columns) < 2 or columns[1] == "None":
                expected = f"/scene/rgb_x.jpg /scene/{self.modality.pair.format('x')}"
                problem = f"{path}:{number}: no {self.modality.name} map in {line!r}; expected {expected!r}"
                if self.on_error == "raise":
                    raise DataError(f"{problem}; take the line off the list, or set on_error='skip'")
                self._skip(columns[0].lstrip("/"), problem)
                continue
            pairs.append((columns[0].lstrip("/"), columns[1].lstrip("/")))
        return pairs

    def _from_folder(self, leave_out_test: bool) -> list[tuple[str, str]]:
        images, others = paths.find(self._folder, paths.IMAGE_SUFFIXES)
        if leave_out_test:
            images = [path for path in images if path.relative_to(self._folder).parts[0] != "official_splits"]
        if passed := [path for path in others if path.name.lstrip("._").startswith(_PREFIX)]:
            logging.warning("passed over what is no image, or hidden: %s", paths.listed(passed))
        maps, pairs = paths.Companions([*images, *others], self.modality.suffixes), []
        for path in images:
            if not path.name.startswith(_PREFIX):
                continue
            name, map_name = path.relative_to(self._folder), self.modality.pair.format(path.stem.removeprefix(_PREFIX))
            if map_path := maps.of(path.with_name(map_name)):
                pairs.append((name.as_posix(), map_path.relative_to(self._folder).as_posix()))
            elif self.on_error == "raise":
                raise FileNotFoundError(
                    f"{path.with_name(map_name)}: missing {self.modality.name} map of {name}; restore it, or set "
                    "on_error='skip'"
                )
            else:
                self._skip(name.as_posix(), f"it has no {self.modality.name} map")
        return pairs
