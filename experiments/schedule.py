"""Cycles of the compiler's schedule for a TPU, for operations of which it gives no estimate: gathers, sorts, kernels.

libtpu writes the schedule of every operation as text, one bundle of instructions a line and a cycle, where it is asked
to (`FLAGS`) when it is loaded. A bundle runs as often as the loops around it; how often these run is the constant of
their exit tests. A kernel of several programs says their grid in its name, as in `forward_kernel_4x48`; what it does
only where an index has one value (`pl.when(pl.program_id(1) == 0)`) runs once for each program of the first axis.
Waiting for memory is not in a schedule.
"""

import re
from collections.abc import Sequence
from pathlib import Path

FLAGS = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles --xla_jf_dump_to="
_FILE = re.compile(r"\d+-(.+)-\d+-final_bundles\.txt")
_BUNDLE = re.compile(r"\s*(?:0x)?[0-9a-f]+\s*(LB|LH|LE|PB|PF|CT)?\s*:[\s>]*\{(.*)")
_BRANCH = re.compile(r"sbr\.rel \((!?)%(\w+)\) target = \$region(\d+)")


def read(folder: Path) -> dict[str, float]:
    """Cycles of one run of every operation whose schedule is in the folder, by the name of its instruction."""
    found = {}
    for path in folder.iterdir():
        if name := _FILE.fullmatch(path.name):
            grid = re.search(r"_(\d+)x(\d+)(\.\d+)?$", name[1])
            found[name[1]] = cycles(path.read_text(), *(map(int, grid.groups()[:2]) if grid else (1, 1)))
    return found


def cycles(text: str, programs: int = 1, inner: int = 1) -> float:
    """Of a schedule: bundles, each times the loops around it, over all programs · inner runs of a kernel."""
    bundles = [found.groups() for line in text.splitlines() if (found := _BUNDLE.match(line))]
    defined = dict(re.findall(r"%(\w+) = (scmp\.[^;}]*)", text))
    times = [1.0] * len(bundles)
    loops = _loops(bundles, defined)
    for start, stop, trips in loops:
        over_programs = programs * inner > 1 and (start, stop, trips) == loops[-1]
        times[start:stop] = [n * (programs * inner if over_programs else trips) for n in times[start:stop]]
    for start, stop in _seldom(bundles, defined) if inner > 1 else ():
        times[start:stop] = [n / inner for n in times[start:stop]]
    return sum(times)


def _loops(bundles: Sequence[tuple], defined: dict[str, str]) -> list[tuple[int, int, int]]:
    """(first bundle, the one after the last, how often) of every loop, in the order in which they end."""
    found, opened = [], []
    for i, (mark, body) in enumerate(bundles):
        if mark == "LB":
            opened.append(i)
        for negated, predicate, _ in _BRANCH.findall(body):
            test = re.search(r", (\d+) /\* loop exit test", defined.get(predicate, ""))
            if negated and test and opened:
                found.append((opened.pop(), i + 1, int(test[1])))
    return found


def _seldom(bundles: Sequence[tuple], defined: dict[str, str]) -> list[tuple[int, int]]:
    """Parts that are jumped over unless an index has one value."""
    found = []
    for i, (*_, body) in enumerate(bundles):
        for negated, predicate, region in _BRANCH.findall(body):
            if not negated and re.match(r"scmp\.ne\.\S+ .*, \d+\s*$", defined.get(predicate, "")):
                ends = (j for j in range(i + 1, len(bundles)) if re.search(rf"region {region}\b", bundles[j][1]))
                found.append((i + 1, next(ends, len(bundles))))
    return found
