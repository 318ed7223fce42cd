"""Trained models as files that predict without this package: StableHLO by `jax.export`, and the weights.

    python -m aitok_jax.export --checkpoint=RUN_OR_DIR --out=DIR [--task=TASK] [--size 480 640]

writes DIR/predict.jaxexport (the program, for CPU, CUDA and TPU), DIR/weights.npz and DIR/export.json (inputs, outputs,
classes and versions), reads them back and compares what they say with the predictor. To run them takes jax, numpy and
flatbuffers:

    program = jax.export.deserialize(bytearray(open("DIR/predict.jaxexport", "rb").read()))
    weights = dict(np.load("DIR/weights.npz"))
    outputs = jax.jit(program.call)(weights, images)

JAX promises that releases of the next six months run such a program.
"""

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import jaxlib
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import aitok_jax
from aitok_jax import paths
from aitok_jax.image import IMAGENET_MEAN, model_size
from aitok_jax.predict.predictor import Predictor
from aitok_jax.tasks.arguments import check_path, check_process, whole_number
from aitok_jax.tasks.base import compiled_predict

PROGRAM, WEIGHTS, DESCRIPTION = "predict.jaxexport", "weights.npz", "export.json"
PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-5
AGAIN = "export it again"


def export(
    predictor: Predictor, folder: str | Path, task: str | None = None, size: Sequence[int] | None = None
) -> dict[str, Any]:
    """Writes `predict` of a part as a program (weights, images) -> outputs for any batch, with weights and description.

    `images` are float32[batch,H,W,3] RGB in 0..1 as the model sees them: resized as `Predictor` does for maps, padded
    squares as of `image.fit_square` for objects. The outputs are those of the part: the map and its `confidence`
    float32[batch,H,W]; or `boxes`, `classes`, `scores`, `valid` and, for instances, `masks`, as `ObjectsPart.predict`
    says. Sampling (`top_p`) has the predictor's seed.

    Args:
        folder: where to; made where absent.
        task: one of `predictor.tasks`; None is the first of them.
        size: for maps, height and width of the images to be predicted, which are resized to what the model sees of
            them; None is a square.
    Returns:
        What is written to export.json.
    Raises:
        ValueError: a task that this model does not do, or a size that does not fit it.
    """
    check_path("folder", folder)
    check_process()
    task = predictor.choose(task)
    part = predictor.parts[task]
    if size is not None and part.kind != "maps":
        raise ValueError(f"size={size!r:.200} is for maps; {task} is predicted on squares: leave it out")
    height, width = model_size(*((1, 1) if size is None else _height_and_width(size)), part.image_size)

    def predict(weights: Mapping[str, jax.Array], images: jax.Array) -> dict[str, jax.Array]:
        tree = unflatten_dict(weights, sep="/")
        batch = {"image": images, "id": jnp.zeros(images.shape[:1], jnp.int32)}
        outputs = part.predict(tree["params"], tree.get("model_state", {}), batch)
        return {name: x for name, x in outputs.items() if (task, name) != ("detection", "masks")}

    weights = _flat_weights(predictor)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    images = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("batch"), height, width, 3), np.float32)
    with jax.enable_x64(False):
        program = jax.export.export(jax.jit(predict), platforms=PLATFORMS)(shapes, images)
    description = _description(predictor, task, program, images)

    folder = paths.expand(folder)
    with paths.writing(folder / PROGRAM) as file:
        file.write(program.serialize())
    with paths.writing(folder / WEIGHTS) as file:
        np.savez(file, **weights)
    description["sha256"] = {name: _sha256(paths.read(folder / name)) for name in (PROGRAM, WEIGHTS)}
    paths.write_text(folder / DESCRIPTION, json.dumps(description, indent=2) + "\n")
    return description


def load(folder: str | Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Reads what `export` wrote: a function of images float32[batch,H,W,3] in 0..1, compiled for each batch size.

    Raises:
        OSError: one of the three files is missing or must not be read.
        ValueError: a file is cut off or otherwise damaged, or the two are not of one export. The function raises it for
            images of another shape or type, or outside of 0..1.
        RuntimeError: in a process forked after a model was loaded; the function, too.
    """
    check_path("folder", folder)
    check_process()
    folder = paths.expand(folder)
    sums = _read(folder / DESCRIPTION).get("sha256", {})  # older exports have none
    program, weights = (_read(folder / name, sums.get(name)) for name in (PROGRAM, WEIGHTS))
    (shapes, images), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    wanted, found = ({name: (x.shape, x.dtype) for name, x in each.items()} for each in (shapes, weights))
    if wrong := sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name)):
        raise ValueError(f"{folder / WEIGHTS} does not fit {PROGRAM} ({wrong[0]} differs); {AGAIN}")
    weights, call = jax.device_put(weights), jax.jit(program.call)

    def run(given: np.ndarray) -> dict[str, np.ndarray]:
        check_process()
        with jax.enable_x64(False):
            return jax.device_get(call(weights, _checked(given, images.shape)))

    return run


def compare(predictor: Predictor, folder: str | Path, batch_size: int = 2) -> dict[str, float]:
    """How far the files in `folder` are from the predictor that they were made of, on random images.

    Returns:
        For each output the largest difference, absolute up to 1 and relative beyond.
    """
    batch_size = whole_number("batch_size", batch_size)
    check_path("folder", folder)
    description = _read(paths.expand(folder) / DESCRIPTION)
    images = np.random.default_rng(0).random((batch_size, *description["input"]["shape"][1:]), np.float32)
    found = load(folder)(images)
    predict = compiled_predict(predictor.parts[description["task"]])
    with jax.enable_x64(False):
        expected = predict(*predictor.weights, {"image": images, "id": np.zeros(batch_size, np.int32)})
    pairs = {name: (np.float64(found[name]), np.float64(expected[name])) for name in description["outputs"]}
    return {name: float(np.max(np.abs(a - b) / np.maximum(1, np.abs(b)))) for name, (a, b) in pairs.items()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(file: Path, sha256: str | None = None) -> Any:
    """One of the files; what is wrong with it is said with its name."""
    try:
        data = paths.read(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing; {AGAIN}") from error
    if sha256 not in (None, _sha256(data)):
        raise ValueError(f"{file} is damaged, or of another export (its sha256 is not that in {DESCRIPTION}); {AGAIN}")
    try:
        if file.name == PROGRAM:
            return jax.export.deserialize(bytearray(data))
        if file.name == WEIGHTS:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                return dict(arrays)
        return json.loads(data)
    except Exception as error:  # each reader raises kinds of its own
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error!s:.200}); {AGAIN}") from error


def _height_and_width(size: Any) -> tuple[int, int]:
    try:
        height, width = size
        return whole_number("height", height), whole_number("width", width)
    except (TypeError, ValueError) as error:
        raise ValueError(f"size={size!r:.200} must be a height and a width in pixels, at least 1") from error


def _checked(images: Any, shape: Sequence[Any]) -> np.ndarray:
    """Images as the program takes them."""
    array, wanted = np.asarray(images), f"float32[batch, {', '.join(map(str, shape[1:]))}] in 0..1"
    if array.dtype.kind != "f" or array.shape[1:] != shape[1:] or not len(array):
        fix = "resize them and divide by 255, as export.json says"
        raise ValueError(f"images must be {wanted}, got {array.dtype} of shape {array.shape}; {fix}")
    if np.ma.is_masked(images) or not np.all((array >= 0) & (array <= 1)):
        raise ValueError(f"images must be {wanted}, but some values are outside, NaN or masked; divide by 255")
    return array.astype(np.float32)


def _flat_weights(predictor: Predictor) -> dict[str, np.ndarray]:
    params, model_state = predictor.weights
    flat = flatten_dict({"params": params, "model_state": model_state}, sep="/")
    return {name: np.asarray(x) for name, x in sorted(flat.items())}


def _description(
    predictor: Predictor, task: str, program: jax.export.Exported, images: jax.ShapeDtypeStruct
) -> dict[str, Any]:
    def described(aval):
        shape = [d if isinstance(d, int) else str(d) for d in aval.shape]
        return {"shape": shape, "dtype": str(aval.dtype)}

    part = predictor.parts[task]
    outputs = sorted(jax.tree.unflatten(program.out_tree, program.out_avals).items())
    how = "resized bilinearly (antialiased where it shrinks) to this size, divided by 255"
    if part.kind == "objects":
        fill = [round(float(x), 6) for x in IMAGENET_MEAN]
        how = f"longer side resized likewise to this size, divided by 255, filled up at the right or bottom with {fill}"
    return {
        "task": task,
        "input": {**described(images), "range": [0, 1], "colour": "RGB", "how": how},
        "outputs": {name: {**described(aval), "meaning": part.meanings[name]} for name, aval in outputs},
        "categories": predictor.categories if part.kind == "objects" else [],
        "platforms": list(program.platforms),
        "versions": {module.__name__: module.__version__ for module in (aitok_jax, jax, jaxlib)},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 1 where the files say something else than the predictor."""
    parser = argparse.ArgumentParser(
        prog="python -m aitok_jax.export",
        description="Writes a trained model as StableHLO that runs without aitok_jax.",
    )
    parser.add_argument("--checkpoint", required=True, help="run directory, directory of converted weights, or builtin")
    parser.add_argument("--out", required=True, help="folder for the files")
    parser.add_argument("--task", help="what it predicts, of what the model can be asked for (default: the first)")
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="of the images, for maps (default: a square)"
    )
    options = parser.parse_args(argv)
    try:
        predictor = Predictor.load(options.checkpoint)
        description = export(predictor, options.out, options.task, options.size)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(json.dumps({name: description[name] for name in ("task", "input", "outputs")}, indent=2))
    worst = compare(predictor, options.out)
    for name, difference in worst.items():
        print(f"{name}: differs from the predictor by {difference:.1e}")
    if not all(difference <= TOLERANCE for difference in worst.values()):
        print(f"more than {TOLERANCE}: do not use {options.out}; please report this", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
