"""Every table of the paper as data: which runs its rows take, what they change, what is published.

An ablation of the paper changes one thing of a published set-up. A row names the set-ups of `setups` that it runs with
every seed, what it changes in their configs, and the published values, where there are any.
`run.py` does the work.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from aitok_jax.tasks.modalities.depth import Depth


@dataclasses.dataclass(frozen=True)
class Column:
    """A metric of the runs of a row: its heading, its name in their metrics, and which way is better."""

    label: str
    metric: str
    best: str = "min"


@dataclasses.dataclass(frozen=True)
class Row:
    """One set-up, with all its seeds.

    Attributes:
        label: of the row.
        changes: set-up -> dotted key of its config -> value, or {scale: value} where scales differ.
        evaluated: set-up -> field of its task -> value, for the evaluation alone: rows that differ in nothing else
            are trained once.
        published: heading of a column -> published value.
        runs: the set-ups, where they are not those of the table.
    """

    label: str
    changes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    evaluated: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)
    runs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Table:
    """`reference`, a label or {scale: label}, is the row that the others are compared with."""

    title: str
    runs: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    reference: str | Mapping[str, str]


DEPTH = Column("depth RMSE", f"{Depth.name}/{Depth.headline[0]}", Depth.headline[1])
D1 = Column("depth δ1", "depth/d1", "max")
DEPTH_TOKENS = Column("tokenizer RMSE", f"{Depth.name}_tokenizer/{Depth.headline[0]}", Depth.headline[1])
BOX = Column("box AP", "instances/box_ap", "max")
MASK = Column("mask AP", "instances/mask_ap", "max")
MASK_TOKENS = Column("tokenizer mask AP", "mask_tokenizer/mask_ap", "max")
HOLES = (
    Column("tokenizer RMSE in holes", "depth_tokenizer/rmse_in_holes"),
    Column("depth RMSE in holes", "depth/rmse_in_holes"),
)
DEPTH_RUNS, MASK_RUNS = ("depth_tokenizer", "depth"), ("mask_tokenizer", "instances")
LENGTH = 256  # tokens of the solvers on scenes; those of objects whose masks have 16 tokens are the longest
TOKENIZER = {"depth": "depth_tokenizer", "instances": "mask_tokenizer"}  # of a solver
AIT_DEPTH = {DEPTH.label: 0.305, D1.label: 0.934}  # Swin-B, as are all published values here
AIT_OBJECTS = {BOX.label: 0.433, MASK.label: 0.342}


def at_scale(value: Any, scale: str) -> Any:
    """The value of a change at a scale."""
    return value[scale] if isinstance(value, Mapping) else value


def tokenizer(solver: str, **fields: Any) -> dict[str, dict[str, Any]]:
    """The same change of a tokenizer where it is trained and where the solver uses it."""
    changes = {f"task.tokenizer.{field}": value for field, value in fields.items()}
    return {TOKENIZER[solver]: changes, solver: changes}


def ablation(
    title: str, solver: str, field: str, values: Mapping[str, Any], reference: str | Mapping[str, str]
) -> Table:
    """One field of a tokenizer: what it does to the reconstruction, and to the solver."""
    depth = solver == "depth"
    full_size, published = ("nyu", AIT_DEPTH) if depth else ("coco", AIT_OBJECTS)
    known = {at_scale(reference, full_size): published}
    rows = [
        Row(label, tokenizer(solver, **{field: value}), published=known.get(label, {}))
        for label, value in values.items()
    ]
    columns = (DEPTH_TOKENS, DEPTH) if depth else (MASK_TOKENS, MASK)
    return Table(title, DEPTH_RUNS if depth else MASK_RUNS, columns, tuple(rows), reference)


def sizes(scenes: tuple[int, ...], published: tuple[int, ...], labels: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """Label -> value of each scale: the scenes are smaller than the published images."""
    rows = zip(labels, scenes, published, strict=True)
    return {label: {"scenes": small, "nyu": full, "coco": full} for label, small, full in rows}


def soft(name: str, solver_input: bool, detokenizer: bool, auxiliary: bool, **published: float) -> Row:
    """A row of table 7. Two of the three uses are only of inference."""
    switches = {"soft_input": solver_input, "soft_detokenize": detokenizer}
    changes = {} if auxiliary else {solver: {"task.aux_weight": 0.0} for solver in TOKENIZER}
    return Row(name, changes, dict.fromkeys(TOKENIZER, switches), published)


def with_length(table: Table, lengths: Mapping[str, Mapping[str, int]]) -> Table:
    """The first row has more tokens than the published tables of positions: set-up -> {scale: max_length}."""
    first, *others = table.rows
    changes = {name: dict(values) for name, values in first.changes.items()}
    for name, length in lengths.items():
        changes.setdefault(name, {})["task.transformer.max_length"] = {"scenes": LENGTH, **length}
    return dataclasses.replace(table, rows=(dataclasses.replace(first, changes=changes), *others))


CODES = {str(codes): codes for codes in (32, 128, 512)}
WIDTHS = ("half", "published", "double")
BLOCKS = (0, 1, 2, 4)


def masked(ratio: float, patch: int) -> dict[str, dict[str, Any]]:
    """Mask augmentation; `patch` in eighths of the side of a token."""
    side = {"scenes": 2 * patch, "nyu": 4 * patch}
    return {"depth_tokenizer": {"task.mask_ratio": ratio, "task.mask_patch": side}}


MASKING = (
    Row("off", masked(0.0, 4)),
    Row("ratio 0.5, half a token", masked(0.5, 4), published=AIT_DEPTH),
    Row("ratio 0.75", masked(0.75, 4)),
    Row("ratio 0.5, a quarter of a token", masked(0.5, 2)),
    Row("ratio 0.5, a whole token", masked(0.5, 8)),
)
ONE_PASS = {"depth": {"task.transformer.parallel": True, "task.soft_input": False}}
JOINT = {DEPTH.label: 0.310, BOX.label: 0.422, MASK.label: 0.341}
NO_SOFT = {DEPTH.label: 0.318, D1.label: 0.932, BOX.label: 0.436, MASK.label: 0.311}

TABLES = {
    "1": ablation("Codebook size, depth", "depth", "num_codes", CODES, "128"),
    "2": ablation("Codebook size, masks", "instances", "num_codes", CODES, "128"),
    "3": ablation("Width, depth", "depth", "hidden", sizes((8, 16, 32), (8, 16, 32), WIDTHS), "published"),
    "4": ablation("Width, masks", "instances", "hidden", sizes((4, 8, 16), (8, 16, 32), WIDTHS), "published"),
    "5": with_length(
        ablation(
            "Down-sampling, depth",
            "depth",
            "downsample",
            {str(ratio): ratio for ratio in (8, 16, 32)},
            {"scenes": "16", "nyu": "32"},
        ),
        {"depth": {"nyu": 3600}},
    ),
    "6": with_length(
        ablation(
            "Down-sampling, masks",
            "instances",
            "downsample",
            sizes((4, 8, 16), (8, 16, 32), ("finer", "published", "coarser")),
            "published",
        ),
        {"detection": {"coco": 6900}, "instances": {"coco": 6900}},
    ),
    "7": Table(
        "The three uses of soft tokens",
        (*DEPTH_RUNS, *MASK_RUNS),
        (DEPTH, D1, BOX, MASK),
        (
            soft("none", False, False, False, **NO_SOFT),
            soft("next-token input", True, False, False),
            soft("detokenizer", False, True, False),
            soft("auxiliary loss", False, False, True),
            soft("all", True, True, True, **AIT_DEPTH, **AIT_OBJECTS),
        ),
        "none",
    ),
    "8": Table("Mask augmentation", DEPTH_RUNS, (DEPTH_TOKENS, DEPTH, *HOLES), MASKING, "off"),
    "9": Table(
        "All tokens in one pass",
        DEPTH_RUNS,
        (DEPTH, D1),
        (
            Row("autoregressive", published=AIT_DEPTH),
            Row("parallel", ONE_PASS, published={DEPTH.label: 0.301, D1.label: 0.940}),
        ),
        "autoregressive",
    ),
    "10": Table(
        "One solver for both tasks",
        (*DEPTH_RUNS, *MASK_RUNS),
        (DEPTH, BOX, MASK),
        (
            Row("one a task", published=AIT_DEPTH | AIT_OBJECTS),
            Row("joint", published=JOINT, runs=("joint",)),
        ),
        "one a task",
    ),
    "11": ablation(
        "Residual blocks of the tokenizer", "depth", "num_res_blocks", {str(blocks): blocks for blocks in BLOCKS}, "2"
    ),
    "B": Table(
        "VQ-VAE, or down-sampling and bins",
        DEPTH_RUNS,
        (DEPTH_TOKENS, DEPTH, D1),
        (Row("VQ-VAE", published=AIT_DEPTH), Row("bins", runs=("bins",))),
        "VQ-VAE",
    ),
}
