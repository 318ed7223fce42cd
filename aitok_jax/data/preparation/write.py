"""Runs a builder: prepared data is made aside, counted and checked, and moved into place when it is whole."""

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from aitok_jax import paths
from aitok_jax.data.preparation.builder import Line, PreparedBuilder, check_broken, problems, read_reports
from aitok_jax.data.sources import prepared
from aitok_jax.data.sources.files import DataError


@dataclasses.dataclass(frozen=True)
class Settings:
    """Attributes:
    out: folder to make the data in; it becomes OUT/NAME/VERSION.
    aside: local folder for what is not finished, on the disk of `out` where that is local too.
    max_broken: broken files and annotations above which it stops with an error.
    manifest: folder with manifest_SPLIT.jsonl that names and hashes must be equal to; '' = none.
    beam, beam_options: whether Apache Beam runs it, and the options of its pipeline, `name=value,...`.
    """

    out: Path
    aside: Path
    max_broken: int = 0
    manifest: str = ""
    beam: bool = False
    beam_options: str = ""


def build(
    settings: Settings,
    builder: Callable[..., PreparedBuilder],
    lines: dict[str, list[Line]],
    broken: list[str],
    annotations: dict[str, tuple[dict[str, Any], str]] | None = None,
    description: dict[str, Any] | None = None,
) -> None:
    """Writes the examples of every split's lines.

    Args:
      builder: makes it, given the options of `PreparedBuilder`.
      broken: what is left out already, with the reason.
      annotations: of every split, the content of its instances JSON, and the digest of the file.
      description: what else prepared.json says.

    Raises:
      ValueError: the data set is there already; DataError: no examples, too many broken ones, others than in the
        manifest.
    """
    work, data = settings.aside / "work", settings.aside / "data"
    for folder in (work, data):
        shutil.rmtree(folder, ignore_errors=True)
    _write_lines(work, lines)
    check_broken(broken, settings.max_broken)
    made = builder(work=work, max_broken=settings.max_broken, beam=settings.beam, data_dir=data)
    place = settings.out / made.name
    if place.exists():
        raise ValueError(f"{place} is there already; delete it to prepare it anew, or give another folder")
    config = tfds.download.DownloadConfig(beam_options=_beam_options(settings) if settings.beam else None)
    tfds.disable_progress_bar()  # the builders show their own
    with contextlib.redirect_stdout(io.StringIO()):  # it would name the folder that is moved below
        try:
            made.download_and_prepare(download_config=config, file_format="tfrecord")
        except AssertionError:  # TFDS writes no split without examples
            _check_any_sound({split: read_reports(work, split) for split in lines})
            raise

    reports = {split: read_reports(work, split) for split in lines}
    for split, entries in reports.items():
        if len(entries) != len(lines[split]):
            raise DataError(f"{work}: {len(entries)} reports on {len(lines[split])} lines of {split}; prepare anew")
    broken = broken + [problem for entries in reports.values() for problem in problems(entries)]
    check_broken(broken, settings.max_broken)
    _check_any_sound(reports)
    sound = {split: [entry for entry in reports[split] if "problem" not in entry] for split in reports}
    if settings.manifest:
        _check_manifest(paths.expand(settings.manifest), sound)
    _write_files(made.data_path, sound, broken, annotations or {}, description or {})
    _put(Path(made.data_path.parent), place)
    for folder in (work, data):
        shutil.rmtree(folder)
    counts = " and ".join(f"{len(entries)} {split}" for split, entries in sound.items())
    print(f"{place}: {counts} examples; {len(broken)} broken{', see broken.txt there' * bool(broken)}")


def _put(folder: Path, place: Path) -> None:
    """Moves what is whole into place; into a bucket, file by file."""
    if not paths.is_url(place):
        folder.rename(place)
        return
    for file in sorted(paths.files(folder), key=lambda file: file.name == prepared.LAST):
        with paths.writing(place / file.relative_to(folder).as_posix()) as copy:
            copy.write(file.read_bytes())


def _write_lines(work: Path, lines: dict[str, list[Line]]) -> None:
    work.mkdir(parents=True)
    for split, entries in lines.items():
        if not entries:
            raise DataError(f"no examples in the split {split!r}; add images, or change the share of the test split")
        with open(work / f"{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)


def _check_any_sound(reports: dict[str, list[Line]]) -> None:
    for split, entries in reports.items():
        if entries and len(why := problems(entries)) == len(entries):
            raise DataError(
                f"all {len(entries)} examples of the split {split!r} are broken; mend some: {'; '.join(why[:3])}"
            )


def _check_manifest(folder: Path, sound: dict[str, list[Line]]) -> None:
    for split, entries in sound.items():
        wanted = prepared.read_manifest(folder, split)
        found = [_files(entry) for entry in entries]
        if found == wanted:
            continue
        known = {entry["name"]: entry for entry in wanted}
        names = {entry["name"] for entry in found}
        other = [entry["name"] for entry in found if entry["name"] in known and entry != known[entry["name"]]]
        raise DataError(
            f"{split} is not the data of {folder}: {len(set(known) - names)} files missing, {len(names - set(known))} "
            f"more, {len(other)} with other bytes{f' (the first: {other[0]})' if other else ''}, of {len(wanted)}, or "
            "in another order; get the data anew, or leave --manifest out"
        )


def _files(report: Line) -> dict[str, str]:
    """A report's entry of the manifest: name and hashes."""
    return {key: value for key, value in report.items() if key not in ("index", "entry", "annotations")}


def _write_files(
    folder: Path,
    sound: dict[str, list[Line]],
    broken: list[str],
    annotations: dict[str, tuple[dict[str, Any], str]],
    description: dict[str, Any],
) -> None:
    """What lies beside the records; see `aitok_jax.data.prepared`."""
    for split, entries in sound.items():
        with open(folder / f"manifest_{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(_files(entry)) + "\n" for entry in entries)
        if split in annotations:
            parts = {
                "images": [entry["entry"] for entry in entries],
                "annotations": [annotation for entry in entries for annotation in entry["annotations"]],
            }
            (folder / f"instances_{split}.json").write_text(json.dumps(annotations[split][0] | parts), encoding="utf-8")
    (folder / "broken.txt").write_text("".join(line + "\n" for line in broken), encoding="utf-8")
    digests = {split: digest for split, (_, digest) in annotations.items()}
    written = description | {"annotations": digests, "broken": len(broken)}
    (folder / prepared.LAST).write_text(json.dumps(written), encoding="utf-8")


def _beam_options(settings: Settings) -> Any:
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise ValueError('--beam needs Apache Beam; install ".[prepare]" in an environment of its own') from None
    return PipelineOptions([f"--{option}" for option in settings.beam_options.split(",") if option])
