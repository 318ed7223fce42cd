"""A table of all published set-ups, at their published batch, on pods that are not there: `chips.py` for each.

    python experiments/pods.py [--chips=v5e:4x4,v6e:4x4] [--setups="nyu.py;coco.py"] [--out=experiments/results/pods]

Each is a process of its own and takes minutes; its numbers are kept in a file of --out, and one that is there is not
measured again. On v5e:16x16 the batch is 16 times as large, what every chip does the same (weak scaling). A set-up
that does not fit is measured again with `WAYS` to make it fit, the first that does. Cycles of kernels are not in the
table: they take `chips.py --schedule`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chips

HERE = Path(__file__).parent
SETUPS = ("nyu.py", "nyu.py:soft=false", "nyu.py:parallel", "nyu.py:backbone=swin_l", "nyu.py:backbone=swin_l,parallel")
SETUPS += ("coco.py:task=detection", "coco.py", "coco.py:soft=false", "joint.py", "vqvae_depth.py", "vqvae_mask.py")
CHIPS = ("v5e:4x4", "v5e:16x16", "v6e:4x4", "h100:8")
WAYS = ([], ["--fsdp=4"], ["--fsdp=4", "--remat=dots"], ["--fsdp=4", "--remat=blocks"])
COLUMNS = (
    "set-up",
    "chip",
    "needs",
    "batch",
    "GiB a chip",
    "TFLOP",
    "GB",
    "exchanged MB",
    "ms",
    "limit",
    "MFU ≤",
    "images/s",
)
TIMES = {"flop_ms": "FLOP", "hbm_ms": "bytes", "links_ms": "links", "cycles_ms": "cycles"}


def measured(setup: str, chip: str, folder: Path) -> dict[str, Any] | None:
    """The numbers of a set-up on a chip, from the folder or new, by the first of WAYS that fits; None: it failed."""
    numbers = None
    for way in WAYS:
        name = "_".join([setup, chip, *way]).translate(str.maketrans(":=,", "---"))
        path = folder / f"{name}.json"
        if not path.exists():
            command = [sys.executable, HERE / "chips.py", f"--config=configs/{setup}", f"--chip={chip}", *way]
            if chip == "v5e:16x16":
                command.append("--times=16")
            if subprocess.run([*command, f"--out={path}"], cwd=HERE.parent, check=False).returncode:
                return None
        numbers = json.loads(path.read_text()) | {"way": " ".join(way)}
        if numbers["peak_gib"] * chips.GIB <= chips.CHIPS[chip.partition(":")[0]].memory_gb * 1e9:
            return numbers
    return numbers


def row(setup: str, chip: str, numbers: dict[str, Any] | None) -> list[str]:
    if numbers is None:
        return [setup, chip, "failed", *["–"] * (len(COLUMNS) - 3)]
    fits = numbers["peak_gib"] * chips.GIB <= chips.CHIPS[chip.partition(":")[0]].memory_gb * 1e9
    limit = max((name for name in TIMES if name in numbers), key=numbers.__getitem__)
    exchanged = sum(entry["bytes"] for entry in numbers["collectives"].values()) / 1e6
    return [
        *(setup, chip, numbers["way"] if fits else "does not fit", str(numbers["batch"]), f"{numbers['peak_gib']:.1f}"),
        *(f"{numbers['gflop'] / 1e3:.2f}", f"{numbers['hbm_gb']:.1f}", f"{exchanged:.0f}", f"{numbers['step_ms']:.1f}"),
        *(TIMES[limit], f"{100 * numbers['mfu']:.0f} %", f"{numbers['images_s']:.0f}"),
    ]


def table(rows: Sequence[Sequence[str]]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python experiments/pods.py", description="Published set-ups on pods.")
    parser.add_argument("--chips", default=",".join(CHIPS), help="(default: %(default)s)")
    parser.add_argument("--setups", default="", help="files of configs, with ';' between them (default: all published)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "pods", help="folder of the numbers")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    setups, rows = options.setups.split(";") if options.setups else SETUPS, []
    for chip in options.chips.split(","):
        for setup in setups:
            rows.append(row(setup, chip, measured(setup, chip, options.out)))
            (options.out / "table.md").write_text(table(rows))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
