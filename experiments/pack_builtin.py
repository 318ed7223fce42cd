"""Makes the weights that come with the package from a finished run of the long quickstart.

    python -m aitok_jax.main --config=configs/quickstart.py:long --workdir=runs/long
    python experiments/pack_builtin.py --run=runs/long

Writes aitok_jax/builtin: the joint solver with both tokenizers as float16, and about.json with the command, the commit
and the versions that it was trained with, and metrics on the unseen scenes of the run: of the solver as it is packed,
of the tokenizers as they were trained.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from aitok_jax.config import ordered, to_json
from aitok_jax.training import checkpoint, loop

COMMAND = "python -m aitok_jax.main --config=configs/quickstart.py:long --workdir=runs/long"
LIMIT = 8e6  # bytes


def pack(run: Path, out: Path) -> dict:
    """Writes the weights of the stages in `run` to the folder `out`, replacing it; returns what about.json says.

    Raises:
        FileNotFoundError: no finished stage there.
        ValueError: the weights take more than `LIMIT` bytes.
    """
    stages = {name: run / name for name in ("tokenizer", "mask_tokenizer", "joint")}
    metrics = {}
    for folder in stages.values():
        metrics |= json.loads((folder / "metrics.json").read_text())  # written when a stage has finished
    config, variables = checkpoint.load_inference(stages["joint"])
    small = jax.tree.map(lambda x: x.astype(np.float16) if x.dtype == np.float32 else x, variables)
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder)
        checkpoint.save_inference(packed, small, _without_paths(config), step=config.train_steps)
        size = sum(file.stat().st_size for file in packed.rglob("*"))
        if size > LIMIT:
            raise ValueError(f"the weights take {size / 1e6:.1f} MB, more than {LIMIT / 1e6:g}; train a smaller model")
        metrics |= loop.evaluate(config, packed)
        about = {"command": COMMAND, **json.loads((stages["joint"] / "env.json").read_text()), "metrics": metrics}
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(packed / checkpoint.FOLDER, out / checkpoint.FOLDER)
    (out / "about.json").write_text(json.dumps(about, indent=2) + "\n")
    return about


def _without_paths(config: ConfigDict) -> ConfigDict:
    """The configuration with '{workdir}' again in place of the folder that the run was in."""
    folder = config.data.depth.root.removesuffix("/scenes")
    return ordered(json.loads(to_json(config).replace(f'"{folder}/', '"{workdir}/')))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="finished run of configs/quickstart.py:long")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "aitok_jax" / checkpoint.BUILTIN)
    options = parser.parse_args()
    for name, value in pack(options.run, options.out)["metrics"].items():
        print(f"{name} {value:.4g}")


if __name__ == "__main__":
    main()
