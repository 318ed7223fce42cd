"""Writes the results of tables as Markdown, CSV and a plot with error bars."""

import csv
import io
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from plan import Plan
from tables import TABLES, Column, at_scale

matplotlib.use("Agg")
from matplotlib import pyplot

ARROW = {"min": "↓", "max": "↑"}
Cell = list[float]  # one value a seed


def write(plan: Plan, results: Mapping[str, Mapping[str, Any]], folder: Path, scale: str) -> list[Path]:
    """Writes FOLDER/table_NAME.md, .csv and .png of every table of the plan; returns the Markdown files.

    Args:
      plan: of `make_plan`.
      results: folder of a run -> its result.json, of the runs that are finished; columns without any are left out.
      folder: made where absent.
      scale: of the runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in dict.fromkeys(table for table, _, _ in plan.cells):
        lines = list(_lines(name, plan, results))
        path = folder / f"table_{name}.md"
        path.write_text(_markdown(name, lines, at_scale(TABLES[name].reference, scale), _origin(name, plan, results)))
        path.with_suffix(".csv").write_text(_csv(lines))
        if lines:
            _plot(name, lines, path.with_suffix(".png"))
        written.append(path)
    return written


def _lines(name: str, plan: Plan, results: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One a row, seed and column, as in the CSV."""
    published = {row.label: row.published for row in TABLES[name].rows}
    for (table, row, seed), folders in plan.cells.items():
        if table != name:
            continue
        metrics = {k: (v, f) for f in folders if f in results for k, v in results[f]["metrics"].items()}
        for column in TABLES[name].columns:
            if column.metric in metrics:
                value, folder = metrics[column.metric]
                line = {"table": name, "row": row, "seed": seed, "column": column.label, "value": value}
                yield line | {"published": published[row].get(column.label, ""), "run": folder}


def _cells(lines: list[dict[str, Any]]) -> tuple[list[str], dict[tuple[str, str], Cell]]:
    cells: dict[tuple[str, str], Cell] = {}
    for line in lines:
        cells.setdefault((line["row"], line["column"]), []).append(line["value"])
    return list(dict.fromkeys(row for row, _ in cells)), cells


def _columns(name: str, cells: Mapping[tuple[str, str], Cell]) -> list[Column]:
    return [column for column in TABLES[name].columns if any(label == column.label for _, label in cells)]


def _markdown(name: str, lines: list[dict[str, Any]], reference: str, origin: str) -> str:
    rows, cells = _cells(lines)
    published = {row.label: row.published for row in TABLES[name].rows}
    header, body = [""], [[row] for row in rows]
    for column in _columns(name, cells):
        known = any(column.label in published[row] for row in rows)
        header += [f"{column.label} {ARROW[column.best]}"] + ["paper"] * known
        for row, line in zip(rows, body, strict=True):
            line.append(_text(cells.get((row, column.label), []), cells.get((reference, column.label), []), column))
            if known:
                line.append(f"{published[row][column.label]:.3f}" if column.label in published[row] else "–")
    table = [header, ["---"] * len(header), *body]
    text = "\n".join(f"| {' | '.join(line)} |" for line in table)
    note = f"▲ better, ▼ worse than *{reference}* with every seed of the one against every seed of the other."
    return f"### Table {name}. {TABLES[name].title}\n\n{text}\n\nMean ± standard deviation. {note}\n{origin}\n"


def _text(values: Cell, reference: Cell, column: Column) -> str:
    """'0.579 ± 0.012 ▲'."""
    if not values:
        return "–"
    sign = {"min": -1.0, "max": 1.0}[column.best]
    ours, theirs = [sign * value for value in values], [sign * value for value in reference]
    mark = ""
    if len(ours) > 1 and theirs and ours != theirs:
        mark = " ▲" if min(ours) > max(theirs) else " ▼" if max(ours) < min(theirs) else ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}{mark}"


def _origin(name: str, plan: Plan, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Seeds, runs, hours, dates, commits and versions of a table's runs, those included that others start from."""
    folders = {folder for (table, _, _), each in plan.cells.items() if table == name for folder in each}
    needed = set()
    while folders - needed:
        needed |= folders
        folders = folders | {other for folder in folders for other in plan.jobs[folder].needs}
    runs = [results[folder] for folder in sorted(needed) if folder in results]
    if not runs:
        return "Nothing is finished."
    seeds = len({seed for (table, _, seed), each in plan.cells.items() if table == name and results.keys() & set(each)})
    hours = sum(run["seconds"] for run in runs) / 3600
    versions = runs[-1]["versions"]
    names = ", ".join(f"{package} {versions[package]}" for package in ("jax", "flax", "optax"))
    parts = [f"{seeds} seed{'s' * (seeds > 1)}", f"{len(runs)} of {len(needed)} runs", f"{hours:.2f} h of one process"]
    for key in ("finished", "commit"):
        parts.append(", ".join(sorted({str(run[key]) for run in runs})))
    device = runs[-1]["devices"]
    return " · ".join([*parts, names, f"{device['count']} {device['kind']}"])


def _csv(lines: list[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, ("table", "row", "seed", "column", "value", "published", "run"), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def _plot(name: str, lines: list[dict[str, Any]], path: Path) -> None:
    """A panel a column: every seed as a dot, mean and standard deviation as a bar."""
    rows, cells = _cells(lines)
    columns = _columns(name, cells)
    size = (1.5 + 2.6 * len(columns), 1.2 + 0.35 * len(rows))
    figure, axes = pyplot.subplots(1, len(columns), sharey=True, squeeze=False, figsize=size, layout="constrained")
    for axis, column in zip(axes[0], columns, strict=True):
        for y, row in enumerate(rows):
            values = cells.get((row, column.label), [])
            if values:
                axis.plot(values, [y] * len(values), ".", color="tab:blue", alpha=0.5)
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                axis.errorbar(statistics.mean(values), y, xerr=spread, fmt="o", color="black", capsize=3)
        axis.set_title(f"{column.label} {ARROW[column.best]}", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(rows)), rows)
    axes[0][0].invert_yaxis()
    figure.suptitle(f"Table {name}. {TABLES[name].title}", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
