"""The fields that a configuration's task may have, with their types: what can be set without being written there."""

from collections.abc import Mapping
from typing import Any

from aitok_jax.config import SHARED, field_types
from aitok_jax.models.swin_v2 import SwinV2
from aitok_jax.models.transformer import TokenTransformer
from aitok_jax.models.vqvae import VQVAE
from aitok_jax.tasks.maps import TOKENIZERS, MapPart
from aitok_jax.tasks.modalities import MODALITIES
from aitok_jax.tasks.objects import ObjectsPart
from aitok_jax.tasks.tokenizer import MapTokenizer, MaskTokenizer
from aitok_jax.tasks.vocabulary import Vocabulary

OBJECTS, MASKS = "instances", "mask"  # kinds of parts that are no map: of a solver, of a tokenizer
_GIVEN = ("modality", "solver", "vocabulary")  # to a part, by what builds it


def task_options(task: Mapping) -> dict[str, Any]:
    """Field -> type (see `config.typed`) of `config.task`, nested as it is, in any form of `translated_task`."""
    name = str(task.get("name", ""))
    if "parts" in task:
        build = _tokenizer if name == "tokenizer" else _part
        parts = {part: build(str(own.get("name", part)), own) for part, own in task["parts"].items()}
        return {"name": str, "parts": parts} | ({} if name == "tokenizer" else {"shared": _shared()})
    if name.endswith("_tokenizer"):
        return _tokenizer(name.removesuffix("_tokenizer"), task)
    return _part(name, task) | _shared()


def _shared() -> dict[str, Any]:
    classes = {"backbone": SwinV2, "transformer": TokenTransformer, "vocabulary": Vocabulary}
    return {name: field_types(classes[name]) if name in classes else float for name in SHARED}


def _part(kind: str, own: Mapping) -> dict[str, Any]:
    if kind == OBJECTS:
        return _fields(ObjectsPart) | {"tokenizer": field_types(VQVAE)}
    return _of_map(MapPart, kind, own)


def _tokenizer(kind: str, own: Mapping) -> dict[str, Any]:
    if kind == MASKS:
        return _fields(MaskTokenizer) | {"tokenizer": field_types(VQVAE)}
    return _of_map(MapTokenizer, kind, own)


def _of_map(part: type, kind: str, own: Mapping) -> dict[str, Any]:
    if kind not in MODALITIES:
        return {"name": str}
    tokenizer = (own.get("tokenizer", None)) or {}
    made = TOKENIZERS[tokenizer["kind"]] if "kind" in tokenizer and tokenizer["kind"] in TOKENIZERS else VQVAE
    return _fields(part) | field_types(MODALITIES[kind]) | {"tokenizer": {"kind": str, **field_types(made)}}


def _fields(part: type) -> dict[str, Any]:
    return {"name": str} | {name: kind for name, kind in field_types(part).items() if name not in _GIVEN}
