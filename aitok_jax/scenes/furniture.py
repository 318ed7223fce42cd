"""The furniture of built-in scenes: solids with procedural materials, at plausible sizes in metres.

A thing is described in its own axes: centred on its footprint, z up from the floor, its front towards -y. Every maker
returns (parts, (half x, half y) of the footprint, height).
"""

import colorsys
from typing import NamedTuple

import numpy as np

from aitok_jax.scenes.raycast import BOX, CYLINDER, SPHERE, Material


class Part(NamedTuple):
    kind: int
    center: tuple[float, float, float]
    half: tuple[float, float, float]
    material: Material


class Dice:
    """Short names for the draws of a generator."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def __call__(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, options):
        return options[int(self.rng.random() * len(options))]

    def color(self, hue: tuple[float, float], saturation: tuple[float, float], value: tuple[float, float]):
        """Linear RGB."""
        rgb = colorsys.hsv_to_rgb(self(*hue) % 1, self(*saturation), self(*value))
        return tuple(c * c for c in rgb)


def wood(dice: Dice, value=(0.35, 0.85)) -> Material:
    color = dice.color((0.05, 0.11), (0.3, 0.65), value)
    return Material(color, grain=dice(0.25, 0.5), grain_u=dice(0.5, 1.2), grain_v=0.1, shine=dice.pick((0, 0, 0.4)))


def fabric(dice: Dice) -> Material:
    hue, value = dice(0, 1), dice(0.3, 0.8)
    color = dice.color((hue, hue), (0.1, 0.65), (value, value))
    second = dice.color((hue, hue + 0.1), (0.1, 0.5), (value * 0.5, value))
    stripes = dice.chance(0.25)
    return Material(color, second, cell_u=0.08, checker_u=float(stripes), grain=0.35, grain_u=0.2, grain_v=0.2)


def metal(dice: Dice) -> Material:
    return Material(dice.color((0.5, 0.7), (0, 0.1), (0.15, 0.75)), grain=0.03, shine=dice(0.6, 1.5))


def toy(dice: Dice) -> Material:
    """Bright or dark, patterned or plain."""
    hue = dice(0, 1)
    color = dice.color((hue, hue), (0.4, 0.9), (0.25, 0.95))
    second = dice.color((hue + 0.2, hue + 0.8), (0.1, 0.8), (0.3, 0.95))
    shine = dice.pick((0.0, 0.0, 1.2))
    pattern = dice.pick(("plain", "plain", "stripes", "checker", "marble"))
    if pattern == "plain":
        return Material(color, grain=0.15, shine=shine)
    if pattern == "marble":
        return Material(color, second, marble=1.0, grain_u=0.25, grain_v=0.25, shine=shine)
    cell = dice(0.08, 0.16)
    return Material(
        color, second, cell_u=cell, cell_v=cell, checker_u=float(pattern == "checker"), checker_v=1.0, shine=shine
    )


def _box(dice: Dice):
    x, y, z = dice(0.18, 0.38), dice(0.18, 0.35), dice(0.15, 0.4)
    cardboard = Material(
        dice.color((0.07, 0.1), (0.35, 0.5), (0.55, 0.75)), cell_u=9, cell_v=9, gap=0.05, second=(0.4, 0.3, 0.18)
    )
    slats = wood(dice)._replace(cell_u=9, cell_v=0.1, gap=0.012, second=(0.05, 0.03, 0.02), variation=0.3)
    return [Part(BOX, (0, 0, z), (x, y, z), dice.pick((cardboard, slats, toy(dice))))], (x, y), 2 * z


def _sphere(dice: Dice):
    r = dice(0.14, 0.38)
    return [Part(SPHERE, (0, 0, r), (r, r, r), toy(dice))], (r, r), 2 * r


def _cylinder(dice: Dice):
    r, z = dice(0.13, 0.28), dice(0.18, 0.45)
    return [Part(CYLINDER, (0, 0, z), (r, r, z), dice.pick((toy, metal, wood))(dice))], (r, r), 2 * z


def _legs(x: float, y: float, height: float, thick: float, kind: int, material: Material) -> list[Part]:
    z = height / 2
    spots = [(i * (x - thick), j * (y - thick), z) for i in (-1, 1) for j in (-1, 1)]
    return [Part(kind, spot, (thick, thick, z), material) for spot in spots]


def _table(dice: Dice):
    height, top, board = dice(0.68, 0.78), dice(0.015, 0.03), wood(dice)
    low = dice.chance(0.25)
    if low:
        height = dice(0.38, 0.5)
    legs = dice.pick((board, metal(dice)))
    z = height - top
    if dice.chance(0.3):
        r = dice(0.4, 0.65)
        parts = [
            Part(CYLINDER, (0, 0, z), (r, r, top), board),
            Part(CYLINDER, (0, 0, (z - top) / 2), (0.045, 0.045, (z - top) / 2), legs),
            Part(CYLINDER, (0, 0, 0.02), (r * 0.55, r * 0.55, 0.02), legs),
        ]
        return parts, (r, r), height
    x, y = dice(0.45, 0.9), dice(0.32, 0.48)
    kind = dice.pick((BOX, CYLINDER))
    parts = [Part(BOX, (0, 0, z), (x, y, top), board), *_legs(x, y, z - top, dice(0.02, 0.04), kind, legs)]
    return parts, (x, y), height


def _chair(dice: Dice):
    half, seat, back = dice(0.2, 0.24), dice(0.42, 0.48), dice(0.82, 1.02)
    frame = dice.pick((wood, metal))(dice)
    cover = dice.pick((fabric(dice), frame, toy(dice)))
    parts = [Part(BOX, (0, 0, seat - 0.025), (half, half, 0.025), cover)]
    if dice.chance(0.3):  # on a column with a round foot
        parts += [
            Part(CYLINDER, (0, 0, seat / 2 - 0.025), (0.03, 0.03, seat / 2 - 0.025), frame),
            Part(CYLINDER, (0, 0, 0.02), (half, half, 0.02), frame),
        ]
    else:
        parts += _legs(half, half, seat - 0.05, 0.02, BOX, frame)
    if dice.chance(0.5):  # a closed back, or two posts and rails
        parts.append(Part(BOX, (0, half - 0.02, (seat + back) / 2), (half, 0.02, (back - seat) / 2), cover))
    else:
        z = (back - seat) / 2
        parts += [Part(BOX, (i * (half - 0.02), half - 0.02, seat + z), (0.02, 0.02, z), frame) for i in (-1, 1)]
        parts += [Part(BOX, (0, half - 0.02, seat + z * k), (half - 0.04, 0.012, z * 0.22), frame) for k in (0.8, 1.6)]
    return parts, (half, half), back


def _shelf(dice: Dice):
    x, y, height, boards = dice(0.3, 0.65), dice(0.14, 0.19), dice(0.8, 2.05), 0.012
    board = dice.pick((wood(dice), Material(dice.color((0, 1), (0, 0.15), (0.75, 0.95)))))
    parts = [Part(BOX, (0, y - boards, height / 2), (x, boards, height / 2), board)]
    parts += [Part(BOX, (i * (x - boards), 0, height / 2), (boards, y, height / 2), board) for i in (-1, 1)]
    count = max(round(height / dice(0.32, 0.42)), 2)
    for k in range(count + 1):
        z = boards + (height - 2 * boards) * k / count
        parts.append(Part(BOX, (0, 0, z), (x, y, boards), board))
        if k < count and dice.chance(0.75):  # a row of books: stripes of about their width
            tall, wide, hue = height / count * dice(0.3, 0.42), x * dice(0.4, 0.9), dice(0, 1)
            books = Material(
                dice.color((hue, hue + 0.3), (0.3, 0.8), (0.3, 0.8)),
                dice.color((hue + 0.4, hue + 0.7), (0.2, 0.8), (0.3, 0.9)),
                cell_u=dice(0.03, 0.05),
                checker_u=1.0,
                variation=0.9,
            )
            offset = dice(-1, 1) * (x - boards - wide)
            parts.append(Part(BOX, (offset, 0.02, z + boards + tall), (wide, y * 0.7, tall), books))
    return parts, (x, y), height


def _sofa(dice: Dice):
    x, y, seat, back, arm = dice(0.45, 1.05), dice(0.4, 0.48), dice(0.38, 0.46), dice(0.75, 0.9), dice(0.08, 0.12)
    cloth, feet = fabric(dice), wood(dice)
    parts = [
        Part(BOX, (0, 0, seat / 2), (x, y, seat / 2 - 0.06), cloth),
        Part(BOX, (0, y - 0.11, (back + seat) / 2), (x, 0.11, (back - seat) / 2), cloth),
        *(Part(BOX, (i * (x - arm), 0, seat / 2 + 0.1), (arm, y, seat / 2 + 0.08), cloth) for i in (-1, 1)),
        *_legs(x, y, 0.07, 0.025, BOX, feet),
    ]
    cushions = 2 if x > 0.7 else 1
    wide = (x - 2 * arm) / cushions
    for k in range(cushions):
        center = (-x + 2 * arm + wide * (2 * k + 1), -0.1, seat)
        parts.append(Part(BOX, center, (wide - 0.01, y - 0.12, 0.06), cloth))
    return parts, (x, y), back


def _lamp(dice: Dice):
    """A floor lamp: foot, pole and a glowing shade."""
    height, r, z = dice(1.35, 1.75), dice(0.16, 0.26), dice(0.11, 0.17)
    frame = metal(dice)
    warm = dice.color((0.07, 0.13), (0.1, 0.45), (0.85, 1.0))
    shade = Material(warm, emission=dice(0.6, 1.5), grain=0.1)
    parts = [
        Part(CYLINDER, (0, 0, 0.015), (0.15, 0.15, 0.015), frame),
        Part(CYLINDER, (0, 0, height / 2 - z), (0.016, 0.016, height / 2 - z), frame),
        Part(dice.pick((CYLINDER, CYLINDER, SPHERE)), (0, 0, height - z), (r, r, z), shade),
    ]
    return parts, (r, r), height


def _plant(dice: Dice):
    """A pot with a stem and a few balls of leaves."""
    r, pot, height = dice(0.12, 0.2), dice(0.1, 0.18), dice(0.6, 1.4)
    color, dark = dice.color((0.22, 0.38), (0.4, 0.75), (0.3, 0.6)), dice.color((0.25, 0.38), (0.5, 0.8), (0.1, 0.25))
    leaves = Material(color, dark, marble=1.0, grain=0.5, grain_u=0.15, grain_v=0.15)
    parts = [
        Part(CYLINDER, (0, 0, pot), (r, r, pot), toy(dice)),
        Part(CYLINDER, (0, 0, height * 0.4), (0.02, 0.02, height * 0.4), wood(dice)),
    ]
    for k in range(int(dice(2, 6))):
        size = dice(0.1, 0.22)
        z = max(height - size - 0.15 * k * dice(0.5, 1), 2 * pot + size)
        parts.append(Part(SPHERE, (dice(-0.12, 0.12), dice(-0.12, 0.12), z), (size, size, size * dice(0.6, 1)), leaves))
    return parts, (0.28, 0.28), height


MAKERS = {
    "box": _box,
    "sphere": _sphere,
    "cylinder": _cylinder,
    "table": _table,
    "chair": _chair,
    "shelf": _shelf,
    "sofa": _sofa,
    "lamp": _lamp,
    "plant": _plant,
}
CLASSES = tuple(MAKERS)
