"""Loads the configurations of configs/."""

import importlib

from ml_collections import ConfigDict


def load(name: str, arg: str | None = None) -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config(arg)
