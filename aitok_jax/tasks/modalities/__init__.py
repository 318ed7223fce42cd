"""Dense maps, one file each. A new one is its file, and its class here."""

from aitok_jax.tasks.modalities.depth import Depth
from aitok_jax.tasks.modalities.modality import Modality
from aitok_jax.tasks.modalities.normals import Normals
from aitok_jax.tasks.modalities.semantic import Semantic

MODALITIES: dict[str, type[Modality]] = {modality.name: modality for modality in (Depth, Normals, Semantic)}
