"""What the builders share: from lines that say what to read, to examples and a report on every line.

A line is a JSON object with `index` and `name`. It is loaded by a function of the builder, in this process or by
Apache Beam, which reads and writes text files, so that the workers need nothing but folders that all of them see.
"""

import abc
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tqdm import tqdm

from aitok_jax.command_line.progress import progress_bar
from aitok_jax.data.sources.files import READ_ERRORS, DataError

Line = dict[str, Any]
Example = dict[str, Any]
Load = Callable[[Line], tuple[Example, Line]]  # the example of a line, and what its report says besides
# TFDS sorts by keys below this number, in 1000 buckets of equal width; with small keys one bucket would hold all.
_KEYS = 2**128


class PreparedBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes the splits whose lines are in WORK/SPLIT.jsonl, in their order; reports go to WORK/reports_SPLIT*.

    Args:
      work: folder of the lines.
      max_broken: broken examples of a split above which it stops with a DataError; Beam goes on to the end.
      beam: whether Beam runs it.
      **options: those of TFDS.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, work: Path, max_broken: int = 0, beam: bool = False, **options: Any):
        self._work, self._max_broken, self._beam = work, max_broken, beam
        super().__init__(**options)

    @abc.abstractmethod
    def load(self) -> Load:
        """A function of its module (workers import it); raises one of READ_ERRORS for a broken example."""

    def _split_generators(self, dl_manager):
        del dl_manager
        return {path.stem: self._generate_examples(path) for path in sorted(self._work.glob("*.jsonl"), reverse=True)}

    def _generate_examples(self, path: Path):
        count = _count_lines(path)
        reports = self._work / f"reports_{path.stem}"
        if self._beam:
            return _with_beam(path, count, reports, self.load())
        return _serially(path, count, reports, self.load(), self._max_broken)


def read_reports(work: Path, split: str) -> list[Line]:
    """The reports on all lines of a split, in their order; those on broken examples have a `problem`."""
    lines = [line for path in work.glob(f"reports_{split}*") for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(map(json.loads, lines), key=lambda report: report["index"])


def check_broken(broken: list[str], limit: int) -> None:
    """DataError where there are more of them, files with the reason, than the limit."""
    if len(broken) > limit:
        raise DataError(
            f"{len(broken)} broken, more than the {limit} allowed; mend them, or leave them out with a higher "
            "--max_broken:\n  " + "\n  ".join(broken[:5] + ["…"] * (len(broken) > 5))
        )


def problems(reports: list[Line]) -> list[str]:
    return [f"{report['name']}: {report['problem']}" for report in reports if "problem" in report]


def attempt(text: str, load: Load) -> tuple[Line, Example | None]:
    """The report on a line, and the example, None where it is broken."""
    line = json.loads(text)
    report = {"index": line["index"], "name": line["name"]}
    try:
        example, details = load(line)
    except READ_ERRORS as error:
        return report | {"problem": str(error)}, None
    return report | details, {"name": line["name"], **example}


def _keyed(pair: tuple[Line, Example | None], count: int) -> list[tuple[int, Example]]:
    report, example = pair
    return [] if example is None else [(report["index"] * (_KEYS // count), example)]


def _serially(path: Path, count: int, reports: Path, load: Load, limit: int) -> Iterator[tuple[int, Example]]:
    broken = []
    with open(path, encoding="utf-8") as lines, open(reports, "w", encoding="utf-8") as file:
        bar = progress_bar(lines, desc=f"prepare {path.stem}", total=count, unit="example")
        for text in bar:
            report, example = attempt(text, load)
            file.write(json.dumps(report) + "\n")
            yield from _keyed((report, example), count)
            if example is None:
                broken += problems([report])
                bar.set_postfix(broken=len(broken), refresh=False)
                check_broken(broken, limit)


def _with_beam(path: Path, count: int, reports: Path, load: Load):
    """A PTransform; the runner shows its progress too, in the counters `loaded` and `broken`."""
    import apache_beam as beam

    @beam.ptransform_fn
    def read(pipeline):
        loaded = (
            pipeline
            | "Lines" >> beam.io.ReadFromText(str(path))
            | "Spread" >> beam.Reshuffle()
            | "Load" >> beam.Map(functools.partial(_counted, load=load))
        )
        _ = (
            loaded
            | "Report" >> beam.Map(_report)
            | "WriteReports" >> beam.io.WriteToText(str(reports), append_trailing_newlines=True)
        )
        return loaded | "Keys" >> beam.FlatMap(functools.partial(_keyed, count=count))

    return read()


def _counted(text: str, load: Load) -> tuple[Line, Example | None]:
    import apache_beam as beam

    report, example = attempt(text, load)
    beam.metrics.Metrics.counter("prepare", "broken" if example is None else "loaded").inc()
    _progress().update()
    return report, example


@functools.cache
def _progress() -> tqdm:
    """That of a worker of Beam."""
    return progress_bar(desc="prepare, this worker", unit="example")


def _report(pair: tuple[Line, Example | None]) -> str:
    return json.dumps(pair[0])


def _count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)
