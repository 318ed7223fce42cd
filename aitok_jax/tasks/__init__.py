"""What the loop trains and the predictor runs: a task is made of parts; a dense map is one file of `modalities`."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from aitok_jax.config import SHARED, build_dataclass, translated_task, unknown
from aitok_jax.models.swin_v2 import SwinV2
from aitok_jax.models.task_solver import TaskSolver
from aitok_jax.models.transformer import TokenTransformer
from aitok_jax.tasks import maps, objects, tokenizer
from aitok_jax.tasks.base import Task
from aitok_jax.tasks.modalities import MODALITIES as MODALITIES
from aitok_jax.tasks.options import MASKS, OBJECTS
from aitok_jax.tasks.solver import SolverTask
from aitok_jax.tasks.vocabulary import Vocabulary, with_codes

DTYPES = ("auto", "float32", "bfloat16")


def build(config: Mapping) -> Task:
    """The task of `config.task`, in the form of parts or that of one part (see `config.translated_task`).

    A solver: `shared` holds `backbone`, `transformer` and `vocabulary`, the fields of their classes, and
    `init_variance`; `parts` the fields of each part, whose kind is its `name`, or else its key: 'instances', or a
    modality. A tokenizer has one part, whose `name` is 'mask' or a modality.

    Raises:
        ValueError: for an unknown kind or field (with the nearest valid one), or sizes that do not fit each other.
    """
    fields = translated_task(config)
    builders = {"solver": _solver, "tokenizer": _tokenizer}
    if fields["name"] not in builders:
        raise ValueError(f"task.name={fields['name']!r} is no task; its parts are what is trained")
    return builders[fields["name"]](fields)


def _tokenizer(fields: Mapping[str, Any]) -> tokenizer.TokenizerTask:
    ((name, part),) = fields["parts"].items()
    kind, own = part.get("name", name), {key: value for key, value in part.items() if key != "name"}
    if kind == MASKS:
        return tokenizer.TokenizerTask(name, tokenizer.build_masks(own))
    modality, own = maps.split_fields(own, kind)
    own["tokenizer"] = maps.build_tokenizer(modality, own.get("tokenizer", {}))
    return tokenizer.TokenizerTask(name, build_dataclass(tokenizer.MapTokenizer, {**own, "modality": modality}))


def _solver(fields: Mapping[str, Any]) -> SolverTask:
    shared, parts = dict(fields.get("shared", {})), dict(sorted(fields["parts"].items()))
    for key in shared:
        if key not in SHARED:
            raise ValueError(f"task.shared: {unknown(key, SHARED)}")
    for name, part in parts.items():
        if own := [key for key in SHARED if key in part]:
            raise ValueError(f"task.parts.{name}.{own[0]}: give it once, in task.shared")
    kinds = {name: part.get("name", name) for name, part in parts.items()}
    vocabulary = _vocabulary(shared.get("vocabulary", {}), {kinds[name]: part for name, part in parts.items()})
    shared["transformer"] = _with_rows(shared.get("transformer", {}), kinds.values())
    common = {"solver": build_solver(shared, vocabulary), "vocabulary": vocabulary}
    built = {}
    for name, part in parts.items():
        own = {key: value for key, value in part.items() if key != "name"}
        if kinds[name] == OBJECTS:
            built[name] = objects.build(own, common)
        else:
            built[name] = maps.build(kinds[name], own, common)
    return SolverTask(parts=built, init_variance=shared.get("init_variance", 0.0), **common)


def _vocabulary(fields: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> Vocabulary:
    """With a window for every tokenizer's codes: the published ones, then others. `codes`, where given, wins."""
    given = dict(tuple(pair) for pair in fields.get("codes", ()))
    sizes = {}
    for kind, part in parts.items():
        options = part.get("tokenizer", None if kind == OBJECTS else {})
        if options is not None:
            sizes[MASKS if kind == OBJECTS else kind] = options.get("num_codes", 128)
    others = {key: value for key, value in fields.items() if key != "codes"}
    return with_codes(build_dataclass(Vocabulary, others), sizes | given)


def _with_rows(transformer: Mapping[str, Any], kinds: Iterable[str]) -> dict[str, Any]:
    """With rows of the task and position tables for maps that come after the published ones."""
    rows = [MODALITIES[kind].task_id + 1 for kind in kinds if kind in MODALITIES]
    given = transformer.get("num_tasks", TokenTransformer.num_tasks)
    return {**transformer, "num_tasks": max(given, *rows)} if rows else dict(transformer)


def build_solver(shared: Mapping[str, Any], vocabulary: Vocabulary) -> TaskSolver:
    """The solver of a config's `backbone` and `transformer`.

    Their `dtype`, of arithmetic, is of DTYPES: 'auto', the default, is bfloat16 on accelerators and float32 on a CPU.
    Parameters, softmax, cosine attention, LayerNorm, logits and losses are float32 always; tokenizers are too, where
    nothing else is asked for, since they are small and a code is a decision.

    Raises:
        ValueError: an unknown field or dtype.
    """
    backbone, transformer = ({"dtype": "auto", **shared.get(name, {})} for name in ("backbone", "transformer"))
    for name, values in (("backbone", backbone), ("transformer", transformer)):
        if values["dtype"] not in DTYPES:
            raise ValueError(f"{name}.dtype={values['dtype']!r} must be one of {', '.join(DTYPES)}")
        if values["dtype"] == "auto":
            values["dtype"] = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    transformer = {"vocab_size": vocabulary.size, **transformer}
    return TaskSolver(build_dataclass(SwinV2, backbone), build_dataclass(TokenTransformer, transformer))
