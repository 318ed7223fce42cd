"""Installs aitok_jax: `pip install .` (CPU), `pip install ".[cuda]"` or `pip install ".[tpu]"`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "aitok_jax" / "__init__.py").read_text()).group(1)
SHIPPED = "aitok_jax.shipped.configs"  # where aitok_jax.command_line.usage looks for them

setup(
    name="aitok_jax",
    version=VERSION,
    description="All in Tokens in JAX: depth maps and instance masks as tokens, predicted by one soft-token solver",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["aitok_jax", "aitok_jax.*"]), SHIPPED],
    package_dir={SHIPPED: "configs"},
    package_data={"aitok_jax": ["builtin/**/*"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "chex>=0.1.92",
        "orbax-checkpoint>=0.12.8",
        "etils[epath]>=1.15",  # paths in buckets, and with it fsspec; Orbax uses it too
        "ml-collections>=1.1.0",
        "absl-py>=2.1",
        "numpy>=2.0",
        "ml_dtypes>=0.5",
        "scipy>=1.14",
        "pycocotools>=2.0.11",
        "tensorflow-cpu>=2.21",
        "tensorflow-datasets>=4.9.10",
        "google-crc32c>=1.6",  # the checksums of TFRecords
        "importlib_resources>=6.0",  # tensorflow-datasets 4.9.10 imports it without declaring it
        "clu>=0.0.12",
        "tensorboard>=2.20",  # clu's metric writers import it; tensorflow 2.21 no longer brings it
        "pillow>=11.0",
        "matplotlib>=3.9",
        "tqdm>=4.66",
        "flatbuffers>=24.3",  # jax.export writes and reads its files with it
    ],
    extras_require={
        "cuda": ["jax[cuda12]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "gcs": ["gcsfs>=2026.9"],  # gs://
        "s3": ["s3fs>=2026.9"],  # s3://
        "chips": ["jax[tpu]>=0.10.2"],  # compiles for TPUs that are not there: experiments/chips.py
        "test": ["pytest>=8.0", "pytest-xdist>=3.6", "ruff>=0.12", "gcsfs>=2026.9", "gcp-storage-emulator>=2026.7"],
        "prepare": ["apache-beam>=2.77", "mlcroissant>=1.1"],  # lowers other packages: in an environment of its own
        "notebooks": ["jupytext>=1.16", "nbclient>=0.10", "ipykernel>=6.29"],
    },
)
