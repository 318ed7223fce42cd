"""The token vocabulary, one flat table (arXiv 2301.02229, task solver): the only place that knows an offset."""

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Window:
    """A contiguous range of token ids, [start, start + size)."""

    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Lays the windows out one after the other: coordinates, classes, two specials, the codes of each tokenizer, spare.

    The defaults are the published ones: 2339 tokens, or 2467 with the 128 spare codes of some published set-ups.

    Attributes:
        num_bins: coordinate tokens run over 0..num_bins, so there are num_bins + 1 of them.
        num_classes: object classes.
        codes: name and size of the windows of codes, in their order.
        num_spare: unused ids at the end, there only so that published weights fit.
    """

    num_bins: int = 2000
    num_classes: int = 80
    codes: tuple[tuple[str, int], ...] = (("mask", 128), ("depth", 128))
    num_spare: int = 0

    def __post_init__(self):
        for name, size in (("num_bins", self.num_bins), ("num_classes", self.num_classes)):
            if size < 1:
                raise ValueError(f"vocabulary.{name}={size} must be at least 1")
        names = [name for name, _ in self.codes]
        if len(set(names)) != len(names):
            raise ValueError(f"vocabulary.codes={self.codes} must have each name once")

    @property
    def coordinates(self) -> Window:
        return Window(0, self.num_bins + 1)

    @property
    def classes(self) -> Window:
        return Window(self.coordinates.stop, self.num_classes)

    @property
    def end_of_sequence(self) -> int:
        return self.classes.stop

    @property
    def noise(self) -> int:
        return self.classes.stop + 1

    def codes_of(self, name: str) -> Window:
        """The window of a tokenizer's codes; ValueError where there is none of this name."""
        start = self.noise + 1
        for window, size in self.codes:
            if window == name:
                return Window(start, size)
            start += size
        raise ValueError(f"the vocabulary has no codes named {name!r}, only {', '.join(n for n, _ in self.codes)}")

    @property
    def size(self) -> int:
        return self.noise + 1 + sum(size for _, size in self.codes) + self.num_spare


def same_meaning(
    old: Vocabulary, new: Vocabulary, old_names: Sequence[str] = (), new_names: Sequence[str] = ()
) -> dict[int, int]:
    """The tokens of `new` that mean what one of `old` means: new id -> old id.

    Coordinates by their place in the image, codes by their tokenizer's name, classes by their names, or where one of
    the two has no names and both have as many classes, by their places.
    """
    scale = old.num_bins / new.num_bins
    pairs = {token: round(token * scale) for token in range(new.num_bins + 1)}
    if old_names and new_names:
        places = {name: i for i, name in enumerate(old_names)}
        classes = {i: places[name] for i, name in enumerate(new_names) if name in places}
    else:
        classes = {i: i for i in range(new.num_classes)} if old.num_classes == new.num_classes else {}
    pairs |= {new.classes.start + i: old.classes.start + j for i, j in classes.items()}
    pairs |= {new.end_of_sequence: old.end_of_sequence, new.noise: old.noise}
    for name, size in new.codes:
        if dict(old.codes).get(name) == size:
            starts = new.codes_of(name).start, old.codes_of(name).start
            pairs |= {starts[0] + code: starts[1] + code for code in range(size)}
    return pairs


def with_codes(vocabulary: Vocabulary, sizes: Mapping[str, int]) -> Vocabulary:
    """The same with windows of these sizes: those it has keep their places, others follow in their order."""
    new = {**dict(vocabulary.codes), **sizes}
    return dataclasses.replace(vocabulary, codes=tuple(new.items()))
