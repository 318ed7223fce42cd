"""Loads the files of configs/, which is a folder of files and no package."""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

FOLDER = Path(__file__).parents[1] / "configs"


def load(name: str, arg: str | None = None) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)
