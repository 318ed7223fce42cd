"""The command line of the predictor.

    python -m aitok_jax.predict --checkpoint=RUN_OR_DIR --task=TASK --image FILE_OR_FOLDER_OR_PATTERN... --out=DIR

writes for each image NAME.ext, at the image's own size and orientation, NAME_panel.png and

- for a dense map: what its modality writes, NAME_TASK.npy and a picture, or of classes an indexed NAME_TASK.png with
  their names in NAME_TASK.json; NAME_confidence.npy (float32, 0..1) and, of a map of distances, where --ply_fov gives
  the camera's horizontal field of view in degrees, NAME_points.ply;
- for instances and detection: NAME_instances.json, all objects as a list of COCO results with NAME as `image_id`, or
  with the id that the image has in --annotations. The panel shows those whose score is at least --min_score.

Of several tasks, --task=A,B, panel, confidence and points are NAME_A_panel.png, NAME_B_panel.png and so on.

Beside these, results.json holds the objects of all images, as pycocotools' `COCO.loadRes` takes them with the JSON of
--annotations, and categories.json the classes. Their ids are those of the categories of the same names in
--annotations; objects of classes that it does not have are not in results.json.

`aitok_results.jsonl` there names these files: they are replaced by the next run, and never taken for images; a file
that is not in it is replaced only with --overwrite. Two images of one NAME are refused, and images that are not in
--annotations. An image that cannot be read is reported, the others are still predicted, and the exit code is 1.
"""

import argparse
import itertools
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from aitok_jax import paths
from aitok_jax.command_line.progress import progress_bar
from aitok_jax.image import model_size, read_image
from aitok_jax.predict import coco_ids, outputs, pointcloud
from aitok_jax.predict.outputs import Results, find_images, name_results, result_names
from aitok_jax.predict.predictor import BATCH_SIZE, Predictor


def main(argv: Sequence[str] | None = None) -> int:
    """Predicts what `argv` says; returns the exit code: 0, or 1 where an image could not be read."""
    options = _parser().parse_args(argv)
    try:
        results = Results(options.out, options.overwrite)
        files, passed_over = find_images(options.image)
        stems = name_results(files)
        predictor = Predictor.load(options.checkpoint)
        tasks = _checked(options, predictor)
        ids, unlisted = stems, {}
        if options.annotations:
            annotations = coco_ids.Annotations(options.annotations)
            ids = annotations.of_files(list(stems))
            predictor.categories, unlisted = annotations.of_classes(predictor.categories)
        kinds = {predictor.parts[task].kind for task in tasks}
        together = outputs.TOGETHER if "objects" in kinds else []
        names = (result_names(predictor, tasks, stem, options) for stem in stems.values())
        results.check([*itertools.chain(*names), *together])
    except (ValueError, OSError) as error:
        _parser().error(str(error))
    if passed_over:
        print(f"passed over: {paths.listed(passed_over)}", file=sys.stderr)

    if unlisted:
        print(
            f"{options.annotations} has no category {paths.listed(unlisted.values())}: objects of these classes are "
            f"left out of {outputs.TOGETHER[0]}, and are in NAME_instances.json alone",
            file=sys.stderr,
        )

    failed: list[Path] = []
    found: list[dict] = []
    with progress_bar(total=len(stems), unit="image", disable=len(stems) == 1) as bar:
        for images in _read(list(stems), kinds, options.batch_size, failed, bar):
            try:
                found += outputs.write(predictor, tasks, images, stems, ids, results, options)
            except OSError as error:
                sys.exit(f"error: {error}; {bar.n} of {len(stems)} images are done")
            bar.update(len(images))
    if together:
        listed = [each for each in found if each["category_id"] not in unlisted]
        outputs.write_together(listed, predictor.categories, results)
    if failed:
        print(f"{len(failed)} of {len(stems)} images failed: {paths.listed(failed)}", file=sys.stderr)
    print(f"{len(results.written)} files of {len(stems) - len(failed)} images in {paths.shown(results.folder)}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m aitok_jax.predict", description="Predicts dense maps, or objects, from RGB images."
    )
    parser.add_argument("--checkpoint", required=True, help="run directory, directory of converted weights, or builtin")
    parser.add_argument(
        "--task", help="what to predict, of what the model can be asked for, or several as a,b (default: the first)"
    )
    parser.add_argument(
        "--image",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="images, folders of images, or quoted patterns such as 'photos/*.jpg' ('**' for all folders below)",
    )
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--annotations", metavar="JSON", help="COCO JSON that has the ids of images and classes")
    parser.add_argument("--overwrite", action="store_true", help="replace files in --out that are no results of ours")
    parser.add_argument(
        "--min_score", type=float, default=0.5, help="lowest score of an object in the panel (default: %(default)s)"
    )
    parser.add_argument("--augment", action="store_true", help="average maps over mirror image and zoom")
    parser.add_argument("--ply_fov", type=float, metavar="DEGREES", help="write point clouds for this field of view")
    parser.add_argument(
        "--batch_size",
        type=int,
        default=BATCH_SIZE,
        help="images of one size predicted together (default: %(default)s)",
    )
    return parser


def _checked(options: argparse.Namespace, predictor: Predictor) -> list[str]:
    """The tasks to predict. ValueError for options that do not fit them."""
    given = [options.task] if options.task is None else options.task.split(",")
    tasks = list(dict.fromkeys(predictor.choose(each) for each in given))
    if not 0 <= options.min_score <= 1:
        raise ValueError(f"--min_score={options.min_score} must be in 0..1; 0 keeps all objects")
    if options.batch_size < 1:
        raise ValueError(f"--batch_size={options.batch_size} must be at least 1")
    named, parts = ",".join(tasks), [predictor.parts[task] for task in tasks]
    objects = [task for task, part in zip(tasks, parts, strict=True) if part.kind == "objects"]
    if len(objects) > 1:
        raise ValueError(f"--task={named}: {' and '.join(objects)} are the same objects; give one of them")
    if options.annotations and not objects:
        raise ValueError(f"--annotations is for objects, not for --task={named}; leave it out")
    if options.augment and objects:
        raise ValueError(f"--augment is for maps, not for --task={objects[0]}; leave it out")
    if options.ply_fov is not None:
        if not any(outputs.tells_distances(part) for part in parts):
            raise ValueError(f"--ply_fov is for maps of distances, not for --task={named}; leave it out")
        pointcloud.focal_length(1, options.ply_fov)
    return tasks


def _read(
    files: Sequence[Path], kinds: Collection[str], count: int, failed: list[Path], bar: tqdm
) -> Iterator[dict[Path, np.ndarray]]:
    """The images, `count` files at a time; those that cannot be predicted are reported and added to `failed`."""
    for start in range(0, len(files), count):
        images = {}
        for path in files[start : start + count]:
            try:
                image = read_image(path)
                if "maps" in kinds:
                    model_size(*image.shape[:2], 1)
            except Exception as error:  # decoders raise many kinds; one bad file must not stop the others
                tqdm.write(f"{paths.shown(path)}: cannot be predicted: {error}", file=sys.stderr)
                failed.append(path)
                bar.update()
            else:
                images[path] = image
        if images:
            yield images


if __name__ == "__main__":
    sys.exit(main())
