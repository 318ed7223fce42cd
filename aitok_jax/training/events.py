"""TensorBoard's files of a run, written by TensorFlow: into a local folder, from where they are copied to a bucket."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from aitok_jax import paths

LOG = logging.getLogger(__name__)
_PATTERN = "events.out.tfevents.*"


class Events:
    """Writes into a folder, for a run that goes on from a step; what was logged after that step is dropped."""

    def __init__(self, folder: Path, start: int):
        self._folder, self._aside = folder, None
        if paths.is_url(folder):
            self._aside = tempfile.TemporaryDirectory(prefix="aitok_events_")
            for file in folder.glob(_PATTERN):
                Path(self._aside.name, file.name).write_bytes(paths.read(file))
        self._local = folder if self._aside is None else Path(self._aside.name)
        _drop_after(self._local, start)
        self._writer = _writer(self._local)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._writer.write_scalars(step, values)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._writer.write_images(step, {name: pixels[None]})

    def configuration(self, step: int, text: str, values: dict[str, int | float | str]) -> None:
        self._writer.write_texts(step, {"config": text})
        self._writer.write_hparams(values)

    def flush(self) -> None:
        """Puts into the folder what was written so far; into a bucket, by writing the file anew."""
        self._writer.flush()
        self._copy()

    def close(self) -> None:
        self._writer.close()
        self._copy()
        if self._aside is not None:
            self._aside.cleanup()

    def _copy(self) -> None:
        if self._aside is None:
            return
        for file in self._local.glob(_PATTERN):
            with paths.writing(self._folder / file.name) as target:
                target.write(file.read_bytes())


def _drop_after(folder: Path, step: int) -> None:
    """Drops what would be shown twice when it comes again."""
    files = sorted(folder.glob(_PATTERN))
    if not files:
        return
    import tensorflow as tf

    part = folder / "events.part"  # a kill may leave it; TensorBoard does not take it for one of its files
    for file in files:
        with tf.io.TFRecordWriter(str(part)) as writer:
            try:
                for record in tf.compat.v1.io.tf_record_iterator(str(file)):
                    if tf.compat.v1.Event.FromString(record).step <= step:
                        writer.write(record)
            except tf.errors.DataLossError:
                LOG.info("%s ends in the middle of an event", file)
        part.replace(file)


def _writer(folder: Path) -> Any:
    from clu import metric_writers  # imports TensorFlow, which is slow

    return metric_writers.SummaryWriter(str(folder))
