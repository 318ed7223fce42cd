"""Furnished rooms by chance: what stands where in a built-in scene, as seen by which camera, in which light.

Everything is in metres, x and y on the floor, z up.
"""

import math
from typing import NamedTuple

import numpy as np

from aitok_jax.scenes.furniture import CLASSES, MAKERS, Dice, Part, metal, toy, wood
from aitok_jax.scenes.raycast import BOX, CYLINDER, FOCAL, SPHERE, Material, Solids, World

MAX_ASPECT = 2.0  # width over height up to which depths are sure to stay within MIN_DEPTH and MAX_DEPTH
MIN_DEPTH, MAX_DEPTH = 0.5, 10.0

_FLUSH = 0.08  # metres; what hangs on walls and ceiling is flatter than this
_ORDER = ("sofa", "shelf", "table", "chair", "lamp", "plant", "box", "cylinder", "sphere")  # large things come first
_CHOICES = (*_ORDER, "table", "chair", "chair", "box", "box", "cylinder", "sphere")  # the common ones more than once


class Camera(NamedTuple):
    eye: np.ndarray  # f32[3]
    view: np.ndarray  # f32[3,3]: rows right, down, forward
    yaw: float


def sample_room(rng: np.random.Generator) -> tuple[World, np.ndarray]:
    """A room with 3 to 10 objects before the camera, and their classes int32[objects] (indices into CLASSES).

    The room measures 3-9 m x 3-9 m x 2.4-3.2 m; the camera is 1.0-1.8 m high and looks down by 0-25 degrees. Whatever
    is seen in an image up to MAX_ASPECT times as wide as high is between MIN_DEPTH and MAX_DEPTH away.
    """
    dice = Dice(rng)
    while True:
        room = (dice(3, 9), dice(3, 9), dice(2.4, 3.2))
        camera = _camera(dice, room)
        if camera is None:
            continue
        builder = _Builder(dice, room, camera)
        if builder.furnish():
            return builder.world(), np.array(builder.classes, np.int32)


def _camera(dice: Dice, room: tuple[float, float, float]) -> Camera | None:
    """A camera that looks into the room from near the wall behind it, or None after some trials."""
    size = np.array(room, np.float32)
    corners = size * ((np.arange(8)[:, None] >> np.arange(3)) & 1)
    slope = np.array([MAX_ASPECT, 1]) / 2 / FOCAL
    for _ in range(20):
        yaw, pitch, roll = dice(0, 2 * math.pi), math.radians(dice(-25, 0)), math.radians(dice(-3, 3))
        flat = (math.cos(yaw), math.sin(yaw))
        x, y = dice(0.3, room[0] - 0.3), dice(0.3, room[1] - 0.3)
        ahead, behind = _to_walls(room, x, y, flat), _to_walls(room, x, y, (-flat[0], -flat[1]))
        retreat = max(behind - dice(0.3, 1.2), 0)
        x, y, ahead = x - flat[0] * retreat, y - flat[1] * retreat, ahead + retreat
        if ahead < 2.2:
            continue
        forward = np.array([flat[0] * math.cos(pitch), flat[1] * math.cos(pitch), math.sin(pitch)])
        right, eye = np.array([flat[1], -flat[0], 0]), np.array([x, y, dice(1.0, 1.8)])
        down = np.cross(forward, right)
        c, s = math.cos(roll), math.sin(roll)
        view = np.stack([c * right + s * down, c * down - s * right, forward])
        if ((corners - eye) @ forward).max() > MAX_DEPTH - 0.1:
            continue
        rays = np.array([(i * slope[0], j * slope[1], 1) for i in (-1, 1) for j in (-1, 1)]) @ view
        # The nearest point of a plane is seen in a corner of the image.
        forth, back = size - _FLUSH - eye, _FLUSH - eye
        if np.where(rays > 0, forth / np.maximum(rays, 1e-9), back / np.minimum(rays, -1e-9)).min() > MIN_DEPTH:
            return Camera(eye.astype(np.float32), view.astype(np.float32), yaw)
    return None


def _to_walls(room, x: float, y: float, direction: tuple[float, float]) -> float:
    def one(position, size, d):
        return ((size if d > 0 else 0) - position) / d if abs(d) > 1e-9 else math.inf

    return min(one(x, room[0], direction[0]), one(y, room[1], direction[1]))


def _overlap(a, b) -> bool:
    """Whether two rectangles (x, y, half x, half y, yaw) overlap (separating axes)."""
    for x, y, hx, hy, yaw, other in ((*a, b), (*b, a)):
        c, s = math.cos(yaw), math.sin(yaw)
        dx, dy = other[0] - x, other[1] - y
        turn = other[4] - yaw
        ct, st = abs(math.cos(turn)), abs(math.sin(turn))
        if abs(c * dx + s * dy) > hx + other[2] * ct + other[3] * st:
            return False
        if abs(c * dy - s * dx) > hy + other[2] * st + other[3] * ct:
            return False
    return True


class _Builder:
    """Fills a room step by step."""

    def __init__(self, dice: Dice, room: tuple[float, float, float], camera: Camera):
        self.dice, self.room, self.camera = dice, room, camera
        self.parts: list[tuple[Part, float, int]] = []  # part in world axes, yaw, object
        self.classes: list[int] = []
        self.footprints: list[tuple[float, float, float, float, float]] = []
        self.tables: list[tuple[float, float, float, float, float, float]] = []  # footprint and height
        self.lamps: list[tuple[float, float, float]] = []

    def furnish(self) -> bool:
        """Puts the objects; False where fewer than three found a place."""
        dice = self.dice
        wanted = min(int(dice(3, 11)), 4 + int(self.room[0] * self.room[1] / 5))
        names = [dice.pick(_CHOICES) for _ in range(wanted)]
        for name in sorted(names, key=_ORDER.index):
            for _ in range(15):
                if self._place(name):
                    break
        return len(self.classes) >= 3

    def _place(self, name: str) -> bool:
        dice = self.dice
        if name in ("box", "sphere", "cylinder") and self.tables and dice.chance(0.35):
            return self._place_on_table(name)
        parts, (half_x, half_y), height = MAKERS[name](dice)
        if name in ("shelf", "sofa") or (name in ("table", "plant", "lamp") and dice.chance(0.4)):
            spot = self._at_wall(half_x, half_y)
        elif name == "chair" and self.tables and dice.chance(0.7):
            spot = self._at_table(half_y)
        else:
            spot = self._in_view()
        footprint = (spot[0], spot[1], half_x, half_y, spot[2])
        if not self._free(footprint, height) or any(_overlap(footprint, f) for f in self.footprints):
            return False
        self.footprints.append((spot[0], spot[1], half_x + 0.06, half_y + 0.06, spot[2]))
        if name == "table":
            self.tables.append((*footprint, height))
        if name == "lamp":
            self.lamps.append((spot[0], spot[1], height + 0.1))
        self._put(name, parts, spot, 0.0)
        return True

    def _place_on_table(self, name: str) -> bool:
        dice = self.dice
        x, y, half_x, half_y, yaw, height = table = dice.pick(self.tables)
        size = dice(0.09, 0.16)
        dx, dy = dice(-0.5, 0.5) * (half_x - size), dice(-0.5, 0.5) * (half_y - size)
        c, s = math.cos(yaw), math.sin(yaw)
        tall = size * (1 if name == "sphere" else dice(0.6, 1.6))
        half = (size, size if name != "box" else size * dice(0.6, 1.2), tall)
        kind = {"box": BOX, "sphere": SPHERE, "cylinder": CYLINDER}[name]
        spot = (x + c * dx - s * dy, y + s * dx + c * dy, yaw + dice(-0.5, 0.5))
        if not self._free((*spot[:2], *half[:2], spot[2]), height + 2 * tall):
            return False
        self.tables.remove(table)  # at most one thing on a table
        self._put(name, [Part(kind, (0, 0, tall), half, toy(dice))], spot, height)
        return True

    def _put(self, name: str, parts: list[Part], spot: tuple[float, float, float], floor: float) -> None:
        x, y, yaw = spot
        c, s = math.cos(yaw), math.sin(yaw)
        for part in parts:
            px, py, pz = part.center
            center = (x + c * px - s * py, y + s * px + c * py, floor + pz)
            self.parts.append((part._replace(center=center), yaw, len(self.classes)))
        self.classes.append(CLASSES.index(name))

    def _in_view(self) -> tuple[float, float, float]:
        dice, camera = self.dice, self.camera
        ahead = 1.3 + 6.0 * dice(0, 1) ** 1.3
        aside = dice(-0.55, 0.55) * ahead
        c, s = math.cos(camera.yaw), math.sin(camera.yaw)
        yaw = dice(0, 2 * math.pi) if dice.chance(0.5) else dice.pick((0, 1, 2, 3)) * math.pi / 2 + dice(-0.1, 0.1)
        return float(camera.eye[0]) + c * ahead + s * aside, float(camera.eye[1]) + s * ahead - c * aside, yaw

    def _at_wall(self, half_x: float, half_y: float) -> tuple[float, float, float]:
        dice, (width, depth, _) = self.dice, self.room
        wall, gap = dice.pick((0, 1, 2, 3)), half_y + dice(0.02, 0.06)
        if wall < 2:  # the walls x=0 and x=width; the front (-y) looks into the room
            return (gap if wall == 0 else width - gap), dice(half_x, depth - half_x), math.pi / 2 * (1 - 2 * wall)
        return dice(half_x, width - half_x), (gap if wall == 2 else depth - gap), math.pi * (wall == 2)

    def _at_table(self, half_y: float) -> tuple[float, float, float]:
        dice, (x, y, half_x, half_table, yaw, _) = self.dice, self.dice.pick(self.tables)
        turn = dice.pick((0, 1, 2, 3))
        away = (half_table if turn % 2 == 0 else half_x) + half_y + 0.07 + dice(0, 0.25)
        angle = yaw + turn * math.pi / 2
        return x - math.sin(angle) * away, y + math.cos(angle) * away, angle + dice(-0.2, 0.2)

    def _free(self, footprint: tuple[float, float, float, float, float], height: float) -> bool:
        """Whether a thing is inside the room, before the camera and not too near, with its middle in the image."""
        x, y, half_x, half_y, yaw = footprint
        c, s = math.cos(yaw), math.sin(yaw)
        reach_x, reach_y = half_x * abs(c) + half_y * abs(s), half_x * abs(s) + half_y * abs(c)
        if not (reach_x < x < self.room[0] - reach_x and reach_y < y < self.room[1] - reach_y):
            return False
        if height > self.room[2] - 0.3:
            return False
        eye, (right, down, forward) = self.camera.eye.tolist(), self.camera.view.tolist()
        dx, dy = x - eye[0], y - eye[1]
        reach = abs(forward[0] * c + forward[1] * s) * half_x + abs(forward[1] * c - forward[0] * s) * half_y
        lowest = min(forward[2] * (height - eye[2]), forward[2] * -eye[2])
        if forward[0] * dx + forward[1] * dy - reach + lowest < 0.6:
            return False
        dz = height / 2 - eye[2]
        ahead, aside, below = (a[0] * dx + a[1] * dy + a[2] * dz for a in (forward, right, down))
        return abs(aside) < 0.55 * ahead and abs(below) < 0.42 * ahead

    def world(self) -> World:
        """Adds what is fixed to the room, lights and colours, and gathers everything in arrays."""
        fixed, faces, lights, ambient = _fittings(self.dice, self.room, self.lamps)
        parts = self.parts + [(part, 0.0, -1) for part in fixed]
        materials: dict[Material, int] = {}
        for material in [*faces, *(part.material for part, _, _ in parts)]:
            materials.setdefault(material, len(materials))
        solids = Solids(
            kind=np.array([part.kind for part, _, _ in parts]),
            center=np.array([part.center for part, _, _ in parts], np.float32),
            half=np.array([part.half for part, _, _ in parts], np.float32),
            yaw=np.array([yaw for _, yaw, _ in parts], np.float32),
        )
        to_faces = np.stack([solids.center, np.array(self.room) - solids.center], -1)
        return World(
            room=np.array(self.room, np.float32),
            faces=np.array([materials[face] for face in faces]),
            solids=solids,
            solid_object=np.array([index for _, _, index in parts]),
            solid_face=to_faces.reshape(-1, 6).argmin(1),
            solid_material=np.array([materials[part.material] for part, _, _ in parts]),
            materials=np.array([material.row() for material in materials], np.float32),
            lights=np.array(lights, np.float32),
            ambient=np.array(ambient, np.float32),
            eye=self.camera.eye,
            view=self.camera.view,
        )


def _fittings(dice: Dice, room: tuple[float, float, float], lamps: list[tuple[float, float, float]]):
    """Fixed parts of a room: (parts, materials of its six faces, lights (position, colour), ambient light)."""
    walls = [_wall_material(dice)] * 4
    if dice.chance(0.35):
        walls[int(dice(0, 4))] = _wall_material(dice)
    ceiling = Material(dice.color((0.05, 0.15), (0, 0.08), (0.85, 0.97)), grain=0.05)
    faces = [*walls, _floor_material(dice), ceiling]
    parts = _skirting(dice, room)
    if dice.chance(0.5):
        parts.append(_rug(dice, room))
    windows: list[tuple[float, float, float]] = []
    for wall in range(4):
        _hang(dice, room, wall, parts, windows)

    x, y = room[0] * dice(0.3, 0.7), room[1] * dice(0.3, 0.7)
    warm = dice.color((0.07, 0.13), (0.0, 0.35), (1, 1))
    glow = Material(warm, emission=3.0)
    parts.append(Part(CYLINDER, (x, y, room[2] - 0.03), (0.17, 0.17, 0.03), glow))
    main, second = dice(4, 9), dice(1, 5)
    lights = [(x, y, room[2] - dice(0.12, 0.3), *(main * c for c in warm))]
    if dice.chance(0.75):
        if lamps:
            place, tint = lamps[0], dice.color((0.07, 0.11), (0.15, 0.4), (1, 1))
        elif windows:
            place, tint = dice.pick(windows), dice.color((0.55, 0.65), (0, 0.2), (1, 1))
        else:
            place = (room[0] * dice(0.1, 0.9), room[1] * dice(0.1, 0.9), dice(1.9, room[2] - 0.2))
            tint = dice.color((0, 1), (0, 0.2), (1, 1))
        lights.append((*place, *(second * c for c in tint)))
    bright = dice(0.25, 0.6)
    ambient = tuple(bright * c for c in dice.color((0, 1), (0, 0.12), (1, 1)))
    return parts, faces, lights, ambient


def _wall_material(dice: Dice) -> Material:
    hue, value = dice(0, 1), dice(0.6, 0.97)
    saturation = 0.35 * dice(0, 1) ** 1.7
    color = dice.color((hue, hue), (saturation, saturation), (value, value))
    style = dice.pick(("paint", "paint", "paint", "paper", "bricks", "panels"))
    if style == "paper":
        second = tuple(c * dice(0.7, 0.92) for c in color)
        return Material(color, second, cell_u=dice(0.1, 0.25), checker_u=1.0, grain=0.05)
    if style == "bricks":
        clay = dice.color((0.0, 0.08), (0.05, 0.5), (0.55, 0.9))
        return Material(clay, (0.5, 0.48, 0.45), 0.24, 0.075, stagger=1.0, gap=0.012, variation=0.3, grain=0.15)
    if style == "panels":
        second = tuple(c * 0.45 for c in color)
        return Material(color, second, cell_u=dice(0.12, 0.2), cell_v=9, gap=0.01, variation=0.05)
    return Material(color, grain=dice(0.03, 0.15), grain_u=1.5, grain_v=1.5)


def _floor_material(dice: Dice) -> Material:
    style = dice.pick(("planks", "planks", "tiles", "checker", "carpet"))
    if style == "planks":
        brown = dice.color((0.05, 0.11), (0.25, 0.6), (0.4, 0.85))
        dark = tuple(c * 0.25 for c in brown)
        long, wide = dice(1.0, 1.6), dice(0.13, 0.17)
        across = dice.chance(0.5)
        cells = {"cell_u": wide, "cell_v": long} if across else {"cell_u": long, "cell_v": wide}
        grains = {"grain_u": 0.12, "grain_v": 1.2} if across else {"grain_u": 1.2, "grain_v": 0.12}
        stagger = 0.0 if across else 1.0
        shine = dice.pick((0, 0, 0.25))
        return Material(
            brown, dark, stagger=stagger, gap=0.006, variation=0.35, grain=0.25, shine=shine, **cells, **grains
        )
    hue, value, cell = dice(0, 1), dice(0.45, 0.9), dice(0.3, 0.6)
    color = dice.color((hue, hue), (0, 0.25), (value, value))
    if style == "carpet":
        second = tuple(c * 0.7 for c in color)
        return Material(color, second, marble=0.6, grain=0.3, grain_u=0.12, grain_v=0.12)
    second = dice.color((hue, hue + 0.2), (0, 0.3), (0.15, 0.4) if style == "checker" else (0.25, 0.5))
    alternate = float(style == "checker")
    shine = dice.pick((0, 0.3))
    return Material(color, second, cell, cell, 0.0, 0.01, alternate, alternate, variation=0.12, shine=shine)


def _rug(dice: Dice, room: tuple[float, float, float]) -> Part:
    x, y = dice(0.5, min(1.2, room[0] / 3)), dice(0.5, min(1.5, room[1] / 3))
    hue, value, cell = dice(0, 1), dice(0.3, 0.8), dice(0.1, 0.3)
    color = dice.color((hue, hue), (0.2, 0.7), (value, value))
    second = dice.color((hue, hue + 0.3), (0.1, 0.6), (0.3, 0.8))
    across, along = dice.pick(((1.0, 0.0), (1.0, 1.0), (0.0, 1.0), (0.0, 0.0)))
    cloth = Material(color, second, cell, cell, 0.0, 0.0, across, along, grain=0.4, grain_u=0.1, grain_v=0.1)
    return Part(BOX, (dice(x, room[0] - x), dice(y, room[1] - y), 0.004), (x, y, 0.004), cloth)


def _skirting(dice: Dice, room: tuple[float, float, float]) -> list[Part]:
    width, depth, _ = room
    z, t = dice(0.035, 0.06), 0.008
    paint = Material(dice.color((0.05, 0.15), (0, 0.3), (0.4, 0.97)), grain=0.05)
    along_x = [Part(BOX, (width / 2, y, z), (width / 2, t, z), paint) for y in (t, depth - t)]
    return along_x + [Part(BOX, (x, depth / 2, z), (t, depth / 2, z), paint) for x in (t, width - t)]


def _hang(dice: Dice, room: tuple[float, float, float], wall: int, parts: list[Part], windows: list) -> None:
    """Puts a door, windows or pictures side by side on a wall (0: x=0, 1: x max, 2: y=0, 3: y max)."""
    length, flat = (room[1] if wall < 2 else room[0]), room[wall // 2]

    def add(along: float, z: float, half_along: float, half_z: float, thick: float, material: Material):
        across = thick if wall % 2 == 0 else flat - thick
        if wall < 2:
            parts.append(Part(BOX, (across, along, z), (thick, half_along, half_z), material))
        else:
            parts.append(Part(BOX, (along, across, z), (half_along, thick, half_z), material))

    white = Material((0.75, 0.75, 0.72), grain=0.04)
    position = dice(0.2, 0.8)
    while True:
        what = dice.pick(("door", "window", "picture", "picture", "nothing"))
        half = {"door": 0.45, "window": dice(0.4, 0.8), "picture": dice(0.15, 0.45), "nothing": 0.4}[what]
        position += half
        if position + half > length - 0.15:
            return
        if what == "door":
            leaf = dice.pick((white, wood(dice)))
            add(position, 1.03, 0.5, 1.03, 0.012, leaf)
            add(position, 1.0, 0.43, 1.0, 0.014, leaf._replace(color=tuple(c * 0.85 for c in leaf.color)))
            parts.append(_knob(dice, wall, flat, position + 0.36))
        elif what == "window":
            z, tall = dice(1.45, 1.6), dice(0.45, 0.6)
            sky = Material(dice.color((0.52, 0.62), (0.05, 0.4), (0.85, 1.0)), emission=dice(0.8, 2.0), grain=0.3)
            add(position, z, half, tall, 0.03, white)
            for side in (-0.5, 0.5):
                add(position + side * (half - 0.05), z, (half - 0.09) / 2, tall - 0.06, 0.034, sky)
            inside = 0.45 if wall % 2 == 0 else flat - 0.45
            windows.append((inside, position, z) if wall < 2 else (position, inside, z))
        elif what == "picture":
            z, tall = dice(1.4, 1.7), half * dice(0.6, 1.3)
            add(position, z, half, tall, 0.012, dice.pick((wood(dice), metal(dice), white)))
            add(position, z, half - 0.04, tall - 0.04, 0.014, toy(dice)._replace(shine=0.0))
        position += half + dice(0.15, 1.5)


def _knob(dice: Dice, wall: int, flat: float, along: float) -> Part:
    across = 0.06 if wall % 2 == 0 else flat - 0.06
    center = (across, along, 1.02) if wall < 2 else (along, across, 1.02)
    return Part(SPHERE, center, (0.03, 0.03, 0.03), metal(dice))
