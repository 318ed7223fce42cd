"""A process that renders scenes and is killed at a random moment."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

from aitok_jax.data import scenes

SIZES = {"test": 2, "height": 48, "width": 64, "seed": 1}


def test_a_killed_worker_is_an_error_and_made_good(tmp_path, rng):
    delay = rng.uniform(0, 0.5)

    def kill_one():
        while not list(tmp_path.rglob("*.jpg")):
            time.sleep(0.01)
        time.sleep(delay)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(ChildProcessError, match="one of 2 processes that render was ended from outside"):
        scenes.ensure(tmp_path, train=500, **SIZES, workers=2)
    killer.join()
    assert not (tmp_path / "scenes.json").exists()
    scenes.ensure(tmp_path, train=3, **SIZES, workers=1)
    assert len(list(tmp_path.rglob("rgb_*.jpg"))) == 5
