"""Every test sees eight simulated CPU devices, and rank promotion is an error.

What one test has compiled, another takes from a folder that all workers and processes of the session share. Compiling
is most of the tests' time, so XLA's older emitter does it, without the optimizations that cost most but in files marked
`optimized`. The smoke runs of .ci/run compile as users do.
"""

import atexit
import os
import random
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_use_fusion_emitters=false",  # with the next, compiles in a third of the time
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="aitok_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(os.environ.get("AITOK_SHARED_DIR", Path(__file__).parents[2] / "shared"))
# Files that take longest come first, so that at the end no worker waits for another
LONGEST = (
    "end_to_end",
    "joint_run",
    "new_modality",
    "old_runs",
    "first_steps",
    "e2e_depth",
    "notebooks",
    "multihost",
    "real_masks",
    "swin_v2",
    "scaling",
    "buckets",
    "tasks",
    "from_scratch",
)
LONGEST += ("real_frames", "interruptions", "e2e_joint", "export", "joint", "train", "instances_loss")


def pytest_collection_modifyitems(items):
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    jax.config.update("jax_disable_most_optimizations", not request.node.get_closest_marker("optimized"))


@pytest.fixture
def rng():
    """Random moments to kill at: AITOK_TEST_SEED gives others. pytest shows what is printed where the test fails."""
    seed = int(os.environ.get("AITOK_TEST_SEED", "1"))
    print(f"AITOK_TEST_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(scope="session")
def nyu_frames():
    """The folder of real RGB-D frames in the NYUv2 layout; tests that need it are skipped where it is absent."""
    folder = SHARED / "data" / "depth" / "nyu_depth_v2"
    if not folder.is_dir():
        pytest.skip(f"no real frames in {folder}")
    return folder


@pytest.fixture(scope="session")
def coco_subset():
    """The folder of real COCO images, train2017, val2017 and annotations; tests that need it are skipped without it."""
    folder = SHARED / "data" / "coco"
    if not folder.is_dir():
        pytest.skip(f"no real COCO images in {folder}")
    return folder


@pytest.fixture
def write(tmp_path):
    """Writes bytes as a file, a weight file if not named otherwise."""

    def write(data: bytes, name: str = "weights.pth") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write
