"""Configurations: typed argument strings, dataclasses from configs, and readable errors for unknown keys.

Within the package a run's task is made of parts, and data, batch sizes and variants are by part. `translated` is the
one place that knows the shorter form of a run of one part, and what earlier versions wrote.
"""

import dataclasses
import difflib
import graphlib
import json
import re
import sys
import traceback
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """The arguments after the colon of `--config=configs/x.py:backbone=swin_l,parallel`.

    Args:
      arg: comma-separated `name=value`, or a bare `name` for a boolean that becomes True; None or '' for none.
      **defaults: every valid name with its default, whose type (bool, int, float or str) the value takes.

    Returns:
      A ConfigDict with all names of `defaults`.

    Raises:
      ValueError: unknown name, or a value that is not of the default's type.
    """
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        name, given, text = (piece.strip() for piece in part.partition("="))
        if name not in defaults:
            raise ValueError(f"config argument {unknown(name, defaults)}")
        values[name] = _parse_value(name, text if given else None, type(defaults[name]))
    return ConfigDict(values)


def _parse_value(name: str, text: str | None, kind: type) -> Any:
    if kind is bool:
        words = {None: True, "true": True, "1": True, "false": False, "0": False}
        key = text.lower() if text is not None else None
        if key in words:
            return words[key]
    elif text is not None:
        try:
            return kind(text)
        except ValueError:
            pass
    example = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "a word")
    raise ValueError(f"config argument {name}={text or ''} must be {example}, as in {name}={kind(1)}")


def unknown(name: str, valid: Iterable[str]) -> str:
    """'NAME' is unknown; did you mean 'NEAREST'? Valid: ... - the end of an error message."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return f"{name!r} is unknown;{hint} valid: {', '.join(valid) or '(none)'}"


def unknown_flag(argv: Iterable[str], config: ConfigDict) -> str:
    """The message for the first '--config.KEY' of the command line that the config lacks; '' where there is none."""
    leaves = list(flatten(config))
    valid = {".".join(leaf.split(".")[:n]) for leaf in leaves for n in range(1, leaf.count(".") + 2)}
    for argument in argv:
        key = re.match(r"--?config\.([^=]+)", argument)
        if key and re.sub(r"\[.*", "", key[1]) not in valid:
            near = difflib.get_close_matches(key[1], leaves, n=1, cutoff=0.0)
            return f"--config.{key[1]} is unknown; did you mean --config.{near[0]}?"
    return ""


def parse_flags(argv: list[str]) -> list[str]:
    """The positional arguments; a wrong flag, or a wrong configuration in --config, ends the program with one line."""
    _let_configs_import_each_other(argv)
    try:
        args = flags.FLAGS(argv)
        if flags.FLAGS["config"].value is not None:
            len(flags.FLAGS.config.keys())  # an unreadable file is an error only here
    except (TypeError, ValueError, OSError, flags.Error) as error:
        lines = str(error).strip().splitlines()
        sys.exit(f"error: {lines[-1] if 'Traceback' in str(error) else ' '.join(lines)}")
    except Exception as error:  # the file is a program: anything
        sys.exit(f"error: {_broken_config(argv, error)}")
    return args


def _broken_config(argv: Iterable[str], error: Exception) -> str:
    """What is wrong: the file, or an override of a key that it has not."""
    path = re.search(r" --?config[= ](\S+)", " ".join(argv))[1]
    try:
        config = flags.FLAGS["config"].parser.parse(path)
    except Exception as inside:  # as above
        file = path.partition(":")[0]
        lines = [frame.lineno for frame in traceback.extract_tb(inside.__traceback__) if frame.filename.endswith(file)]
        where = f", line {lines[-1]}" if lines else ""
        return f"{file}{where}: {type(inside).__name__}: {inside}; correct the configuration"
    return unknown_flag(argv, config) or str(error)


def _let_configs_import_each_other(argv: Iterable[str]) -> None:
    """Puts the folder that holds the configuration's package (configs/) where Python looks for modules."""
    for path in re.findall(r" --?config[= ]([^\s:]+)", " ".join(argv)):
        sys.path.insert(0, str(Path(path).absolute().parents[1]))


def build_dataclass(cls: type, config: Mapping) -> Any:
    """An instance of the dataclass `cls` with the entries of `config` as its fields.

    Nested mappings become nested dataclasses where the field's type is one, lists become tuples, and the entry `name`
    (which chose the class) is left out where the class has no such field.

    Raises:
      ValueError: an unknown key (names the nearest valid one), or a field without default that is not given.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init and field.name != "parent"}
    types = typing.get_type_hints(cls)
    values = {}
    for key, value in config.items():
        if key not in fields:
            if key == "name":
                continue
            raise ValueError(f"{cls.__name__}: option {unknown(key, fields)}")
        values[key] = _field_value(types[key], value)
    absent = dataclasses.MISSING
    missing = [n for n, f in fields.items() if n not in values and f.default is absent and f.default_factory is absent]
    if missing:
        raise ValueError(f"{cls.__name__}: {', '.join(missing)} must be given")
    return cls(**values)


def _field_value(kind: Any, value: Any) -> Any:
    if isinstance(value, Mapping | ConfigDict):
        nested = [k for k in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(k)]
        return build_dataclass(nested[0], value) if nested else dict(value.items())
    return _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def to_json(config: ConfigDict | Mapping) -> str:
    """Indented JSON of a config; tuples become lists."""
    plain = config.to_dict() if isinstance(config, ConfigDict) else config
    return json.dumps(plain, indent=2)


def flatten(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """{'task.name': value, ...}: the leaves of a nested mapping under dotted names."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def ordered(values: Mapping | ConfigDict) -> ConfigDict:
    """A ConfigDict whose keys, at every level, keep the order that they are given in."""
    nested = {k: ordered(v) if isinstance(v, Mapping | ConfigDict) else v for k, v in values.items()}
    return ConfigDict(nested, sort_keys=False)


SHARED = ("backbone", "transformer", "vocabulary", "init_variance")  # fields of a solver's task that its parts share
_PER_PART = ("data", "batch_size", "eval_batch_size", "eval_variants")
_DEFAULTS = {  # keys that configurations of earlier versions may lack
    **{"ema_decay": 0.0, "fsdp": 1, "accumulate": 1, "start_from": {}, "categories": ()},
    **{"eval_variants": {}, "eval_baseline": False, "eval_first": False, "best_metric": "", "best_mode": "min"},
}
_DATA_DEFAULTS = {"also_root": "", "also_count": 0}


def translated(config: Mapping | ConfigDict) -> ConfigDict:
    """The configuration of a run with a task made of parts, and `data`, `batch_size`, ... by part."""
    plain = {**_DEFAULTS, **(config.to_dict() if isinstance(config, ConfigDict) else config)}
    if isinstance(plain["start_from"], str):
        plain["start_from"] = {"": plain["start_from"]}
    task = translated_task(plain["task"], plain.get("name"))
    if not _has_parts(plain["task"]) and "parts" in task:
        (part,) = task["parts"]
        plain |= {key: {part: plain[key]} for key in _PER_PART if key in plain}
    if "data" in plain:
        plain["data"] = {part: _data(fields) for part, fields in plain["data"].items()}
    return ordered({**plain, "task": task})


def translated_task(task: Mapping | ConfigDict, part: str | None = None) -> dict[str, Any]:
    """`config.task` as {'name': 'solver', 'shared': ..., 'parts': {PART: fields}}; a 'tokenizer' has no `shared`.

    Args:
      task: that, or the fields of one part with its kind ('depth', 'instances', 'depth_tokenizer', ...) as `name`.
      part: the name that such a part gets; its kind where None.
    """
    task = dict(task.to_dict() if isinstance(task, ConfigDict) else task)
    name = task.pop("name", None)
    if "parts" in task or name == "backbone":
        parts = task
    elif name == "joint":
        shared = task.pop("shared", {})
        parts = {"shared": shared, "parts": task}
        name = "solver"
    elif str(name).endswith("_tokenizer"):
        parts = {"parts": {part or name: {"name": name.removesuffix("_tokenizer"), **task}}}
        name = "tokenizer"
    else:
        shared = {key: task.pop(key) for key in SHARED if key in task}
        parts = {"shared": shared, "parts": {part or str(name): {"name": name, **task}}}
        name = "solver"
    if "shared" in parts:
        parts = {**parts, "shared": _shared(dict(parts["shared"]))}
    return {"name": name, **parts}


def _has_parts(task: Mapping) -> bool:
    return "parts" in task or task.get("name") == "joint"


def _data(fields: Any) -> Any:
    if not isinstance(fields, Mapping) or "name" not in fields:
        return fields
    of_maps = {"modality": "depth", "depth_scale": 0.0, "fit": "crop"} if fields["name"] == "nyu" else {}
    return {**_DATA_DEFAULTS, **of_maps, **fields}


def _shared(shared: dict[str, Any]) -> dict[str, Any]:
    """Fields as they are called now."""
    for module in ("backbone", "transformer"):
        if isinstance(remat := shared.get(module, {}).get("remat"), bool):
            shared[module] = {**shared[module], "remat": "blocks" if remat else "none"}
    vocabulary = dict(shared.get("vocabulary") or {})
    sizes = [(name, vocabulary.pop(f"num_{name}_codes", None)) for name in ("mask", "depth")]
    if codes := tuple((name, size) for name, size in sizes if size is not None):
        vocabulary["codes"] = codes
    return {**shared, "vocabulary": vocabulary} if "vocabulary" in shared else shared


def stage_order(stages: ConfigDict) -> list[str]:
    """The names of a config's stages: a stage that mentions '{workdir}/OTHER' comes after OTHER."""
    mentioned = {name: to_json(stage) for name, stage in stages.items()}
    needs = {
        name: [other for other in stages if other != name and re.search(rf"{{workdir}}/{other}\b", mentioned[name])]
        for name in stages
    }
    return list(graphlib.TopologicalSorter(needs).static_order())


def format_workdir(config: ConfigDict, workdir: str) -> ConfigDict:
    """A copy of the config in which every '{workdir}' inside a string (also inside lists) is replaced."""
    return ordered(_format(config.to_dict(), workdir)).lock()


def _format(value: Any, workdir: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _format(item, workdir) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_format(item, workdir) for item in value)
    return value.replace("{workdir}", workdir) if isinstance(value, str) else value
