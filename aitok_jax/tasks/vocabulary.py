"""The token vocabulary: the only place that knows an offset (AIT.md section 3)."""

from __future__ import annotations

import dataclasses


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
    """Lays the windows out one after the other: coordinates, classes, specials, mask codes, depth codes, spare codes.

    The defaults are the published ones: 2339 tokens, or 2467 with the 128 spare codes of the joint set-ups.

    Attributes:
        num_bins: coordinate tokens run over 0..num_bins, so there are num_bins + 1 of them.
        num_classes: object classes.
        num_mask_codes: codes of the mask tokenizer.
        num_depth_codes: codes of the depth tokenizer.
        num_spare: unused ids at the end, there only so that published weights fit.
    """

    num_bins: int = 2000
    num_classes: int = 80
    num_mask_codes: int = 128
    num_depth_codes: int = 128
    num_spare: int = 0

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

    @property
    def mask_codes(self) -> Window:
        return Window(self.noise + 1, self.num_mask_codes)

    @property
    def depth_codes(self) -> Window:
        return Window(self.mask_codes.stop, self.num_depth_codes)

    def object_slots(self, mask_tokens: int) -> list[Window]:
        """The windows of one object's tokens: x1 y1 x2 y2, class, then `mask_tokens` codes (AIT.md section 6.2)."""
        return [self.coordinates] * 4 + [self.classes] + [self.mask_codes] * mask_tokens

    @property
    def size(self) -> int:
        return self.depth_codes.stop + self.num_spare
