"""Configurations: typed argument strings, dataclasses from configs, and readable errors for unknown keys.

Within the package a run's task is made of parts, and data, batch sizes and variants are by part. `translated` is the
one place that knows the shorter form of a run of one part, and what earlier versions wrote.
"""

import ast
import dataclasses
import difflib
import json
import math
import numbers
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
        kind = type(defaults[name])
        try:
            values[name] = typed(name, from_text("true" if kind is bool and not given else text, kind), kind)
        except ValueError as error:
            raise ValueError(f"config argument {error}, as in {name}={kind(1)}") from None
    return ConfigDict(values)


_WORDS = {"none": None, "null": None, "true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_BARE = re.compile(r"""'[^']*'|"[^"]*"|[^\s,:()\[\]{}'"](?:[^,:()\[\]{}'"]|:(?=/))*""")


def from_text(text: str, kind: Any = None) -> Any:
    """What is meant by the text of a command line where a value of `kind` (see `typed`) is wanted.

    Text stays text where text is wanted. Else none, true, yes, off, numbers; (1, 2), [1, 2], 1,2 and {a: 1}, whose
    words need no quotes; and text, where it is nothing of this.
    """
    if kind is str or (str in typing.get_args(kind) and text.lower() != "none"):
        return _unquoted(text)
    if not re.match(r"[\[({]", text.strip()) and "," not in text:
        return _word(text.strip())
    try:
        return ast.literal_eval(_BARE.sub(lambda bare: repr(_word(bare[0].strip())), text.strip()))
    except (ValueError, SyntaxError):
        return text


def _word(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return _unquoted(text)


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


_CALLED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def typed(name: str, value: Any, kind: Any) -> Any:
    """`value`, as one of `kind`; ValueError that begins with `name` where it is none.

    Args:
      kind: bool, int (1e3 is one), float, str, tuple, the type hint of a dataclass's field, or {key: kind} of a
        mapping. What is none of this, such as None, allows all.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in inner:
            return None
        return typed(name, value, next(each for each in inner if each is not types.NoneType))
    if kind is tuple or origin in (tuple, Sequence):
        return _typed_sequence(name, value, kind, inner)
    if isinstance(kind, Mapping) and isinstance(value, str) and kind.get("*") == str | None:
        return value  # one text in the place of all
    if isinstance(kind, Mapping) or dataclasses.is_dataclass(kind):
        if value is None or isinstance(value, Mapping | ConfigDict):
            return value
        raise ValueError(f"{name}={value!r} must be a mapping, such as {{}} or {{key: value}}")
    if kind is bool and value in (0, 1):
        return bool(value)
    if kind is str and isinstance(value, str):
        return value
    if kind in (int, float) and isinstance(value, numbers.Real) and not isinstance(value, bool):
        if math.isfinite(value) and (kind is float or float(value).is_integer()):
            return kind(value)
    elif kind not in _CALLED:
        return value
    raise ValueError(f"{name}={value if isinstance(value, str) else repr(value)} must be {_CALLED[kind]}")


def _typed_sequence(name: str, value: Any, kind: Any, inner: tuple) -> tuple:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if value is None or isinstance(value, Mapping | ConfigDict):
        raise ValueError(f"{name}={value} must be a list, such as (1, 2)")
    if typing.get_origin(kind) is tuple and inner and Ellipsis not in inner:
        if len(values) != len(inner):
            raise ValueError(f"{name}={values} must have {len(inner)} values")
        return tuple(typed(name, each, own) for each, own in zip(values, inner, strict=True))
    return tuple(typed(name, each, inner[0] if inner else None) for each in values)


def check_given(name: str, config: Mapping | ConfigDict, keys: Iterable[str]) -> None:
    """ValueError where `config`, called `name`, lacks one of these keys."""
    if missing := [key for key in keys if key not in config]:
        raise ValueError(f"{name}: {', '.join(missing)} must be given; the files in configs/ have all keys")


def check_mappings(run: ConfigDict) -> None:
    """ValueError where what must be a mapping in a run's configuration is none."""
    for key in ("task", "data", "optim"):
        if key in run and not isinstance(run[key], ConfigDict):
            raise ValueError(f"config.{key}={run[key]!r} must be a mapping, {{key: value}}")


def unknown(name: str, valid: Iterable[str]) -> str:
    """'NAME' is unknown; did you mean 'NEAREST'? Valid: ... - the end of an error message."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return f"{name!r} is unknown;{hint} valid: {', '.join(valid) or '(none)'}"


def field_types(cls: type) -> dict[str, Any]:
    """The fields that `build_dataclass` takes, with their types."""
    hints = typing.get_type_hints(cls)
    own = (field.name for field in dataclasses.fields(cls) if field.init)
    return {name: hints[name] for name in own if name not in ("parent", *(("name",) if _is_module(cls) else ()))}


def _is_module(cls: type) -> bool:
    """Flax gives its modules the fields `parent` and `name`."""
    return any(field.name == "parent" for field in dataclasses.fields(cls))


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


def from_json(text: str, name: str) -> ConfigDict:
    """What `to_json` wrote; ValueError, with the file's `name`, for other text."""
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{name} is no configuration in JSON; give the config.json of a run")
    return ordered(values)


def flatten(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """{'task.name': value, ...}: the leaves of a nested mapping under dotted names."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changes(before: Mapping, after: Mapping) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value before, value after) where two configurations of a run differ; None where there is none."""
    old, new = (flatten(json.loads(to_json(translated(config)))) for config in (before, after))
    return {key: (old.get(key), new.get(key)) for key in new | old if old.get(key) != new.get(key)}


def short_key(key: str, task: Mapping) -> str:
    """A key of the form of parts as a run of one part may write it."""
    if len(task["parts"]) > 1:
        return key
    (part,) = task["parts"]
    for long in (f"task.parts.{part}.", "task.shared."):
        if key.startswith(long):
            return f"task.{key.removeprefix(long)}"
    names = key.split(".")
    return ".".join([names[0], *names[2:]]) if names[0] in PER_PART and names[1:2] == [part] else key


def ordered(values: Mapping | ConfigDict) -> ConfigDict:
    """A ConfigDict whose keys, at every level, keep the order that they are given in (ml_collections sorts them)."""
    keys = values._fields if isinstance(values, ConfigDict) else values
    each = {key: values[key] for key in keys}
    nested = {k: ordered(v) if isinstance(v, Mapping | ConfigDict) else v for k, v in each.items()}
    return ConfigDict(nested, sort_keys=False)


SHARED = ("backbone", "transformer", "vocabulary", "init_variance")  # fields of a solver's task that its parts share
PER_PART = ("data", "batch_size", "eval_batch_size", "eval_variants")
DEFAULTS = {  # keys that configurations of earlier versions may lack
    **{"ema_decay": 0.0, "fsdp": 1, "accumulate": 1, "start_from": {}, "categories": ()},
    **{"eval_variants": {}, "eval_baseline": False, "eval_first": False, "best_metric": "", "best_mode": "min"},
}
_DATA_DEFAULTS = {"also_root": "", "also_count": 0}


def translated(config: Mapping | ConfigDict) -> ConfigDict:
    """The configuration of a run with a task made of parts, and `data`, `batch_size`, ... by part."""
    plain = {**DEFAULTS, **(config.to_dict() if isinstance(config, ConfigDict) else config)}
    if isinstance(plain["start_from"], str):
        plain["start_from"] = {"": plain["start_from"]}
    task = translated_task(plain["task"], plain.get("name"))
    if not _has_parts(plain["task"]) and "parts" in task:
        (part,) = task["parts"]
        plain |= {key: {part: plain[key]} for key in PER_PART if key in plain}
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
    """The names of a config's stages in the order written, but that which mentions '{workdir}/OTHER' after OTHER."""
    needs = {name: {other for other in stages if other != name and mentions(stages[name], other)} for name in stages}
    order: list[str] = []
    while left := [name for name in stages if name not in order]:
        ready = [name for name in left if needs[name] <= set(order)]
        if not ready:
            raise ValueError(
                f"the stages {', '.join(left)} wait for each other: let one of them not mention the others"
            )
        order.append(ready[0])
    return order


def mentions(stage: ConfigDict, other: str) -> bool:
    """Whether a stage reads what another one leaves."""
    return re.search(rf"{{workdir}}/{re.escape(other)}\b", to_json(stage)) is not None


def format_workdir(config: ConfigDict, workdir: str) -> ConfigDict:
    """A copy of the config in which every '{workdir}' inside a string (also inside lists) is replaced."""
    return ordered(_format(config.to_dict(), workdir)).lock()


def _format(value: Any, workdir: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _format(item, workdir) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_format(item, workdir) for item in value)
    return value.replace("{workdir}", workdir) if isinstance(value, str) else value
