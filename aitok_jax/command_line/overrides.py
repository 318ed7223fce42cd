"""`--config=FILE[:ARGUMENTS] --config.KEY=VALUE ...` of a command line.

FILE is Python, whose `get_config(ARGUMENTS)` gives the configuration, or the config.json of a run; `configs/X.py` is
ours where no such file is there. KEY is any that exists: in the file, or by a default in the code. `all.KEY` is that
key of all stages, and of all parts where there are several.
"""

import difflib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from aitok_jax import paths
from aitok_jax.command_line import usage
from aitok_jax.config import PER_PART, check_mappings, flatten, from_json, from_text, ordered, typed

Options = Callable[[Mapping], dict[str, Any]]
"""The options of a run's configuration: key -> type (see `config.typed`), or options, or '*' for any key."""
Path_ = tuple[str, ...]


class Parsed(NamedTuple):
    """Positional arguments, and the configuration with what the command line changed, and as the file has it."""

    arguments: list[str]
    config: ConfigDict | None
    unchanged: ConfigDict | None


def parse_flags(argv: list[str], options: Options, default: Callable[[], str | None] = lambda: None) -> Parsed:
    """Parses absl's flags, among them `config`; whatever is wrong ends the program with one line.

    Args:
      argv: the command line.
      options: of the configuration, or of each of its `stages`.
      default: what --config is where it is not given; called when the other flags are known.
    """
    rest, given = _split(argv)
    try:
        arguments = flags.FLAGS(rest)
        source = flags.FLAGS["config"].value or default()
        if source is None and given:
            raise ValueError(f"--config.{given[0][0]} changes a configuration; give its file, --config=configs/X.py")
        if source is None:
            return Parsed(arguments, None, None)
        config = load(source)
        unchanged = ordered(config)
        override(config, given, options)
    except (ValueError, OSError, flags.Error) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    return Parsed(arguments, ordered(config).lock(), unchanged.lock())


def _split(argv: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The arguments that are no overrides, and (key, text) of those that are."""
    rest, given = [], []
    arguments = iter(argv)
    for argument in arguments:
        match = re.fullmatch(r"--?(no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if not match:
            rest.append(argument)
            continue
        no, key, text = match.groups()
        if text is None:
            text = "false" if no else next(arguments, "true")
        given.append((key, text))
    return rest, given


def load(source: str) -> ConfigDict:
    """The configuration of FILE[:ARGUMENTS]; ValueError, or OSError, for a file that has none."""
    file, argument = re.fullmatch(r"(.+?\.(?:py|json)|[^:]*)(?::(.*))?", source, re.DOTALL).groups()
    path = usage.with_ours(paths.expand(file))
    if path.suffix == ".json":
        return from_json(path.read_text(), str(path))
    if not path.is_file():
        raise FileNotFoundError(f"{file}: No such file; give --config=configs/X.py, or the config.json of a run")
    sys.path.insert(0, str(path.absolute().parent.parent))  # configurations import each other as `configs.X`
    spec = importlib.util.spec_from_file_location("_configuration", path)
    if spec is None:
        raise ValueError(f"{file} is no configuration; give a Python file (.py), or the config.json of a run")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument) if argument is not None else module.get_config()
    except (ValueError, OSError):
        raise
    except Exception as error:  # the file is a program: anything
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise ValueError(f"{file}{where}: {type(error).__name__}: {error}; correct the configuration") from error
    if not isinstance(config, Mapping | ConfigDict):
        raise ValueError(f"{file}: get_config must return a ConfigDict, not {type(config).__name__}")
    config = config if isinstance(config, ConfigDict) else ordered(config)
    stages = config.stages if "stages" in config else {"": config}
    if not (stages and isinstance(stages, Mapping | ConfigDict)):
        raise ValueError(f"{file}: stages must be a mapping of at least one run, {{name: {{key: value}}}}")
    for name, run in stages.items():
        if not isinstance(run, ConfigDict):
            raise ValueError(f"{file}: stages.{name}={run!r} must be a run, {{key: value}}")
        check_mappings(run)
    return config


def override(config: ConfigDict, given: Iterable[tuple[str, str]], options: Options) -> None:
    """Changes a configuration in place by (key, text) one after the other, through its references too.

    Raises:
      ValueError: a key that there is not, with the command for the one that may be meant; a value of another type.
    """
    with config.unlocked(), config.ignore_type():
        for key, text in given:
            found = _places(config, key, text, options)
            if not found:
                raise ValueError(_unknown(config, key, text, options))
            for place, kind, now in found:
                try:
                    value = typed(f"--config.{key}", from_text(text, kind), kind)
                except ValueError as error:
                    example = f", as in --config.{key}={now}" if isinstance(now, int | float | str) else ""
                    raise ValueError(f"{error}{example}") from None
                _set(config, place, value)


def _set(config: ConfigDict, place: Path_, value: Any) -> None:
    for name in place[:-1]:
        if name not in config or not isinstance(config[name], ConfigDict):
            config[name] = ConfigDict(type_safe=False, sort_keys=False)
        config = config[name]
    config[place[-1]] = value


def _places(config: ConfigDict, key: str, text: str, options: Options) -> list[tuple[Path_, Any, Any]]:
    """Where a key of the command line is in the configuration, with kind and value; [] where it is not."""
    names = tuple(key.split("."))
    every, stages = names[0] == "all", config.stages if "stages" in config else None
    if every:
        runs = {(): config} if stages is None else {("stages", name): stage for name, stage in stages.items()}
        names = names[1:]
    elif stages is not None and names[0] == "stages" and len(names) > 2 and names[1] in stages:
        runs, names = {names[:2]: stages[names[1]]}, names[2:]
    elif stages is None:
        runs = {(): config}
    else:
        runs = {}
    found = [(prefix, place) for prefix, run in runs.items() for place in _in_run(run, names, text, every, options)]
    return [((*prefix, *place), *_look(runs[prefix], options(runs[prefix]), place)) for prefix, place in found]


def _in_run(run: Mapping, names: Path_, text: str, every: bool, options: Options) -> list[Path_]:
    """Places in one run, for keys of a run of one part, of all parts or, where not `every`, of the only one."""
    kinds, parts = options(run), list(run["task"]["parts"]) if "task" in run and "parts" in run["task"] else []
    places = [names]
    if parts and names[0] in PER_PART and names[1:2] not in [(part,) for part in parts] and text[:1] != "{":
        places = [(names[0], part, *names[1:]) for part in parts]
    elif parts and names[0] == "task" and _look(run, kinds, names) is None:
        places = [("task", "shared", *names[1:]), *(("task", "parts", part, *names[1:]) for part in parts)]
    found = [place for place in places if names and _look(run, kinds, place) is not None]
    return found if every or len(found) == 1 else []


def _look(run: Mapping, kinds: Any, place: Path_) -> tuple[Any, Any] | None:
    """Kind and value of what is at a place, None where there can be nothing."""
    value = run
    for name in place:
        inside = isinstance(value, Mapping | ConfigDict) and name in value
        if isinstance(kinds, Mapping) and (name in kinds or "*" in kinds):
            kinds = kinds[name] if name in kinds else kinds["*"]
        elif inside:
            kinds = None
        else:
            return None
        value = value[name] if inside else None
    return (_kind(value) if kinds is None else kinds), value


def _kind(value: Any) -> Any:
    if isinstance(value, Mapping | ConfigDict):
        return {}
    return tuple if isinstance(value, list | tuple) else type(value)


def _unknown(config: ConfigDict, key: str, text: str, options: Options) -> str:
    stages = config.stages if "stages" in config else None
    runs = {"": config} if stages is None else {f"stages.{name}.": stage for name, stage in stages.items()}
    valid = [f"{prefix}{leaf}" for prefix, run in runs.items() for leaf in _leaves(run, options(run))]
    said, general = f"--config.{key} is unknown", key.removeprefix("all.").removeprefix("task.")
    places = [".".join(place) for place, *_ in _places(config, f"all.{key}", text, options)]
    same = places or [name for name in valid if f".{name}".endswith(f".{general}")]
    if len(places) > 1 or (places and stages is not None):
        what = "stages" if stages is not None else "parts"
        one, every = f"--config.{same[-1]}={text}", f"--config.all.{key}={text}"
        return f"{said}: there are several {what}; give {one}, or {every} for all of them"
    near = same[-1:] or difflib.get_close_matches(key, valid, n=1, cutoff=0.0)
    return f"{said}; did you mean --config.{near[0]}={text}?" if near else f"{said}; the configuration is empty"


def _leaves(run: Mapping, kinds: Mapping) -> list[str]:
    """All keys but those of the evaluation once more, which are called as fields of the task are."""
    names = dict.fromkeys([*flatten(run), *flatten(kinds)])
    return [name for name in names if "*" not in name and not name.startswith("eval_variants")]
