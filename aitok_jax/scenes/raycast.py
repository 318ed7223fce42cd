"""Ray casting of boxes, cylinders and spheres in a room, in NumPy, fast enough to render training sets on a CPU.

World axes are x, y on the floor and z up, in metres. The image is cut into square tiles; every tile is tested only
against the solids whose screen rectangle touches it, and all (tile, solid) pairs are intersected at once. Shadows
use the same code, with the light as origin. Letters: T tiles, K pixels of a tile, P pairs, S solids, N points.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

BOX, CYLINDER, SPHERE = range(3)
FOCAL = 2 / np.sqrt(3)  # focal length over image height: 60 degrees across a 4:3 image
_CHUNK_PIXELS = 1 << 14  # pixels shaded at once: small enough to stay in the cache
_CHUNK_RAYS = 1 << 15  # (ray, solid) tests at once
_NEAR = 0.05  # metres; edges are cut here before they are projected
_CONTACT = 0.03  # metres; what is nearer to a surface throws no shadow on it, as such lines would only alias


class Material(NamedTuple):
    """A surface: two colours, a grid of cells in metres, and noise. Colours are linear reflectances in 0..1.

    Cells measure `cell_u` x `cell_v`; rows are shifted by `stagger` cells at random; `checker_u`, `checker_v` (0 or 1)
    alternate the colours along that direction; `gap` is the width of the joints, in the second colour; `variation` the
    change of brightness from cell to cell. `grain` is the strength of noise with wave lengths `grain_u`, `grain_v`;
    `marble` (0 to 1) lets noise mix the colours. `shine` is the strength of highlights, `emission` that of light of the
    first colour.
    """

    color: tuple[float, float, float]
    second: tuple[float, float, float] = (0.0, 0.0, 0.0)
    cell_u: float = 1.0
    cell_v: float = 1.0
    stagger: float = 0.0
    gap: float = 0.0
    checker_u: float = 0.0
    checker_v: float = 0.0
    variation: float = 0.0
    grain: float = 0.08
    grain_u: float = 0.4
    grain_v: float = 0.4
    marble: float = 0.0
    shine: float = 0.0
    emission: float = 0.0

    def row(self) -> list[float]:
        return [*self.color, *self.second, *self[2:]]


@dataclasses.dataclass(frozen=True)
class Solids:
    """Solids as arrays: unit shapes scaled by `half`, turned by `yaw` about z and moved to `center`.

    kind int[S] (BOX, CYLINDER with its axis along z, SPHERE), center f32[S,3], half f32[S,3] (half sizes), yaw f32[S].
    """

    kind: np.ndarray
    center: np.ndarray
    half: np.ndarray
    yaw: np.ndarray

    @functools.cached_property
    def axes(self) -> np.ndarray:
        """f32[S,3,3]: multiplies world vectors to give the solid's own unit coordinates."""
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        axes = np.zeros((len(c), 3, 3), np.float32)
        axes[:, 0, 0], axes[:, 0, 1], axes[:, 1, 0], axes[:, 1, 1], axes[:, 2, 2] = c, s, -s, c, 1
        return axes / self.half[:, :, None]

    def to_unit(self, point: np.ndarray) -> np.ndarray:
        """f32[3] or f32[...,1,3] world points in every solid's unit coordinates, f32[...,S,3]."""
        return _apply(self.axes, point - self.center)

    def corners(self) -> np.ndarray:
        """f32[S,8,3]: the corners of the bounding boxes; corner i has the sign of bit k of i along axis k."""
        bits = (np.arange(8)[:, None] >> np.arange(3)) & 1
        offset = (2 * bits - 1).astype(np.float32)[None] * self.half[:, None, :]
        c, s = np.cos(self.yaw)[:, None], np.sin(self.yaw)[:, None]
        x, y = offset[..., 0] * c - offset[..., 1] * s, offset[..., 0] * s + offset[..., 1] * c
        return self.center[:, None, :] + np.stack([x, y, offset[..., 2]], -1)


@dataclasses.dataclass(frozen=True)
class World:
    """All that is seen: a room, its solids, lights and a camera. Everything in metres and linear light."""

    room: np.ndarray  # f32[3]: the room is the box from 0 to here
    faces: np.ndarray  # int[6]: material of x=0, x=max, y=0, y=max, floor, ceiling
    solids: Solids
    solid_object: np.ndarray  # int[S]: the object a solid is part of, -1 for fixed parts of the room
    solid_face: np.ndarray  # int[S]: the face of the room, in that order, that the solid is nearest to
    solid_material: np.ndarray  # int[S]
    materials: np.ndarray  # f32[M, fields of Material]
    lights: np.ndarray  # f32[L,6]: position and colour
    ambient: np.ndarray  # f32[3]
    eye: np.ndarray  # f32[3]
    view: np.ndarray  # f32[3,3]: rows right, down, forward of the camera


class Frame(NamedTuple):
    """What `trace` returns, f32 and int of the image size."""

    light: np.ndarray  # f32[H,W,3]: linear light
    depth: np.ndarray  # f32[H,W]: metres along the optical axis
    objects: np.ndarray  # int[H,W]: the object seen, -1 for the room
    faces: np.ndarray  # int[H,W]: the face of the room seen, or that of the solid seen, as in `World`
    shine: np.ndarray  # f32[H,W]: shine of the material seen
    normals: np.ndarray  # f32[H,W,3]: of the surface seen, in the axes of the camera (right, down, forward)


def _apply(axes: np.ndarray, v: np.ndarray) -> np.ndarray:
    """f32[...,S,3] vectors through f32[S,3,3] matrices whose z axis stays vertical."""
    x, y, z = v[..., 0], v[..., 1], v[..., 2]
    return np.stack(_turn(axes, x, y, z), -1)


def _turn(axes: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    a, b, c, d, e = axes[:, 0, 0], axes[:, 0, 1], axes[:, 1, 0], axes[:, 1, 1], axes[:, 2, 2]
    return a * x + b * y, c * x + d * y, e * z


def hit_distance(kind: int, origin: np.ndarray, direction: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    """Where rays enter a unit shape (half size or radius 1, centred at 0).

    Args:
        kind: BOX, CYLINDER or SPHERE.
        origin: f32[P,3], outside the shape.
        direction: x, y, z, each f32[P,K], of any length.

    Returns:
        f32[P,K]: multiples of `direction`; inf where the shape is missed or behind.
    """
    ox, oy, oz = origin[:, 0:1], origin[:, 1:2], origin[:, 2:3]
    x, y, z = direction
    if kind == BOX:
        near, far = _slab(ox, x)
        for o, d in ((oy, y), (oz, z)):
            near_axis, far_axis = _slab(o, d)
            np.maximum(near, near_axis, out=near)
            np.minimum(far, far_axis, out=far)
    else:
        squared, along = x * x + y * y, ox * x + oy * y
        if kind == SPHERE:
            squared += z * z
            along += oz * z
        squared += 1e-20
        middle = -along / squared
        # The distance of the ray to the centre loses less precision than the usual discriminant.
        gap = 1 - (ox + middle * x) ** 2 - (oy + middle * y) ** 2
        if kind == SPHERE:
            gap -= (oz + middle * z) ** 2
        width = np.sqrt(np.maximum(gap, 0) / squared)
        near, far = middle - width, middle + width
        near[gap < 0] = np.inf
        if kind == CYLINDER:
            near_axis, far_axis = _slab(oz, z)
            np.maximum(near, near_axis, out=near)
            np.minimum(far, far_axis, out=far)
    near[(near > far) | (near <= 0)] = np.inf
    return near


def _slab(origin: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays enter and leave the space between -1 and 1 of one axis."""
    inverse = 1 / (direction + np.float32(1e-20))
    middle = -origin * inverse
    width = np.abs(inverse, out=inverse)
    return middle - width, middle + width


def nearest(solids: Solids, origin: np.ndarray, rays: np.ndarray, tile: np.ndarray, solid: np.ndarray):
    """The first solid along each ray, among the (tile, solid) pairs given, sorted by tile.

    Args:
        origin: f32[3], where all rays start.
        rays: f32[3,T,K].
        tile, solid: int[P].

    Returns:
        f32[T,K] multiples of the ray (inf: none) and int[T,K] solid (-1: none).
    """
    _, tiles, size = rays.shape
    best = np.full((tiles, size), np.inf, np.float32)
    index = np.full((tiles, size), -1, np.int32)
    if not len(tile):
        return best, index
    t_PK = np.empty((len(tile), size), np.float32)
    unit_origin = solids.to_unit(origin)
    kinds, step = solids.kind[solid], max(_CHUNK_RAYS // size, 1)
    for kind in (BOX, CYLINDER, SPHERE):
        rows = np.nonzero(kinds == kind)[0]
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            x, y, z = rays[:, tile[part]]
            direction = _turn(solids.axes[solid[part]][..., None], x, y, z)
            t_PK[part] = hit_distance(kind, unit_origin[solid[part]], direction)
    first = np.nonzero(np.diff(tile, prepend=-1))[0]
    best[tile[first]] = np.minimum.reduceat(t_PK, first, axis=0)
    pair, pixel = np.nonzero((t_PK == best[tile]) & (t_PK < np.inf))
    index[tile[pair], pixel] = solid[pair]
    return best, index


def screen_rectangles(solids: Solids, eye: np.ndarray, view: np.ndarray) -> np.ndarray:
    """f32[S,4]: x0 y0 x1 y1 of every solid on the plane at distance 1 before the camera; x0 > x1 where it is behind."""
    corners = (solids.corners() - eye) @ view.T
    start = np.array([i for i in range(8) for k in range(3) if not i >> k & 1])
    end = np.array([i | 1 << k for i in range(8) for k in range(3) if not i >> k & 1])
    a, b = corners[:, start], corners[:, end]
    low, high = np.where((a[..., 2] < b[..., 2])[..., None], a, b), np.where((a[..., 2] < b[..., 2])[..., None], b, a)
    part = np.clip((_NEAR - low[..., 2]) / np.maximum(high[..., 2] - low[..., 2], 1e-9), 0, 1)[..., None]
    points = np.concatenate([low + part * (high - low), high], axis=1)
    visible = np.concatenate([high[..., 2] > _NEAR] * 2, axis=1)[..., None]
    xy = points[..., :2] / np.maximum(points[..., 2:], _NEAR)
    inf = np.float32(np.inf)
    return np.concatenate([np.where(visible, xy, inf).min(1), np.where(visible, xy, -inf).max(1)], axis=1)


def _shadow_pairs(solids: Solids, light: np.ndarray, low: np.ndarray, high: np.ndarray):
    """(tile, solid) pairs where the solid may stand between the light and the box low..high f32[T,3] of a tile."""
    center, radius = ((low + high) / 2)[:, None], (np.linalg.norm(high - low, axis=1) / 2)[:, None]
    unit_light, unit_center = solids.to_unit(light)[None], solids.to_unit(center)
    unit_radius = radius[..., None] / solids.half
    overlap = (np.minimum(unit_light, unit_center - unit_radius) < 1) & (
        np.maximum(unit_light, unit_center + unit_radius) > -1
    )
    way, to_solid = center - light, solids.center - light
    part = np.clip((way * to_solid).sum(-1) / np.maximum((way * way).sum(-1), 1e-6), 0, 1)
    distance = np.linalg.norm(to_solid - part[..., None] * way, axis=-1)
    return np.nonzero(overlap.all(-1) & (distance < radius + np.linalg.norm(solids.half, axis=1)))


@functools.cache
def _noise_tables() -> tuple[np.ndarray, np.ndarray]:
    """White noise and smooth noise in several octaves, both f32[256,256] in 0..1 and periodic."""
    rng = np.random.default_rng(7)
    smooth = np.zeros((256, 256), np.float32)
    for cells, strength in ((8, 1.0), (16, 0.7), (32, 0.5), (64, 0.35), (128, 0.25)):
        grid, x = rng.random((cells, cells)), np.arange(256) * cells / 256
        i, f = x.astype(int), x % 1
        f = f * f * (3 - 2 * f)
        rows = grid[i] * (1 - f[:, None]) + grid[(i + 1) % cells] * f[:, None]
        smooth += strength * (rows[:, i] * (1 - f) + rows[:, (i + 1) % cells] * f)
    low, high = np.percentile(smooth, (1, 99))
    return rng.random((256, 256), np.float32), np.clip((smooth - low) / (high - low), 0, 1).astype(np.float32)


def _smooth_noise(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Noise in 0..1 with a wave length of about 1."""
    table = _noise_tables()[1]
    u, v = u * 16, v * 16
    i, j = np.floor(u), np.floor(v)
    fu, fv = u - i, v - j
    i, j = i.astype(np.int32), j.astype(np.int32)
    i0, i1, j0, j1 = (i & 255) << 8, ((i + 1) & 255) << 8, j & 255, (j + 1) & 255
    flat = table.ravel()
    top = flat[i0 | j0] * (1 - fu) + flat[i1 | j0] * fu
    bottom = flat[i0 | j1] * (1 - fu) + flat[i1 | j1] * fu
    return top + (bottom - top) * fv


def reflectance(material: np.ndarray, u: np.ndarray, v: np.ndarray, footprint: np.ndarray) -> np.ndarray:
    """f32[3,N] colour of surfaces at (u, v) metres, seen by pixels that cover `footprint` metres.

    Args:
        material: f32[fields,N], one column of material fields a pixel.
    """
    cell_u, cell_v, stagger, gap, checker_u, checker_v, variation, grain, grain_u, grain_v, marble = material[6:17]
    row_position = v / cell_v
    row = np.floor(row_position)
    white = _noise_tables()[0].ravel()
    row_hash = row.astype(np.int32) & 255
    column_position = u / cell_u + stagger * white[row_hash]
    column = np.floor(column_position)
    column_hash = column.astype(np.int32) & 255
    edge_u, edge_v = column_position - column, row_position - row
    edge_u, edge_v = np.minimum(edge_u, 1 - edge_u) * cell_u, np.minimum(edge_v, 1 - edge_v) * cell_v
    # Colours of a checkerboard fade into each other, joints get thinner, where a pixel covers more than an edge.
    sign_u = 1 + checker_u * ((1 - 2 * (column_hash & 1)) * np.minimum(2 * edge_u / footprint, 1) - 1)
    sign_v = 1 + checker_v * ((1 - 2 * (row_hash & 1)) * np.minimum(2 * edge_v / footprint, 1) - 1)
    joint = np.clip((gap / 2 - np.minimum(edge_u, edge_v)) / footprint + 0.5, 0, 1) * np.minimum(gap / footprint, 1)
    noise = _smooth_noise(u / grain_u, v / grain_v)
    mix = np.maximum((1 - sign_u * sign_v) / 2, joint)
    mix = np.maximum(mix, marble * np.clip((noise - 0.5) * 3 + 0.5, 0, 1))
    shade = 1 + grain * (noise - 0.5) + variation * (white[row_hash << 8 | column_hash] - 0.5)
    return (material[0:3] + (material[3:6] - material[0:3]) * mix) * shade


def trace(world: World, height: int, width: int) -> Frame:
    """Renders a world. The camera sees `FOCAL * height` pixels per unit of slope, whatever the width."""
    size = 16 if height * width > 40_000 else 8
    rows, columns = -(-height // size), -(-width // size)
    focal = np.float32(FOCAL * height)
    y, x = np.meshgrid(np.arange(rows * size), np.arange(columns * size), indexing="ij")
    slopes = np.stack([(x + 0.5 - width / 2) / focal, (y + 0.5 - height / 2) / focal]).astype(np.float32)
    slopes = slopes.reshape(2, rows, size, columns, size).transpose(0, 1, 3, 2, 4).reshape(2, rows * columns, size**2)
    x0, y0, x1, y1 = screen_rectangles(world.solids, world.eye, world.view).T
    low, high = slopes[:, :, 0], slopes[:, :, -1]
    touches = (low[0, :, None] <= x1) & (high[0, :, None] >= x0) & (low[1, :, None] <= y1) & (high[1, :, None] >= y0)
    step, parts = max(_CHUNK_PIXELS // size**2, 1), []
    for start in range(0, rows * columns, step):
        stop = min(start + step, rows * columns)
        parts.append(_trace_tiles(world, slopes[:, start:stop], np.nonzero(touches[start:stop]), 1 / focal))

    def image(tiles: list[np.ndarray]) -> np.ndarray:
        joined = np.concatenate(tiles).reshape(rows, columns, size, size, -1)
        joined = joined.transpose(0, 2, 1, 3, 4).reshape(rows * size, columns * size, -1)[:height, :width]
        return np.ascontiguousarray(joined if joined.shape[-1] > 1 else joined[..., 0])

    return Frame(*(image(list(tiles)) for tiles in zip(*parts, strict=True)))


def _trace_tiles(world: World, slopes: np.ndarray, pairs: tuple[np.ndarray, np.ndarray], pixel: np.float32) -> tuple:
    """The fields of `Frame`, [T,K,...], of tiles of rays f32[2,T,K]."""
    right, down, forward = world.view[:, :, None, None]
    rays = right * slopes[0] + down * slopes[1] + forward  # as the forward part is 1, multiples of a ray are depths
    depth, solid = nearest(world.solids, world.eye, rays, *pairs)
    forth = rays >= 0
    face = np.where(forth, world.room[:, None, None], 0) - world.eye[:, None, None]
    to_face = face / np.where(forth, np.maximum(rays, 1e-9), rays)
    axis, wall = to_face.argmin(0), to_face.min(0)
    solid[wall < depth] = -1
    depth = np.minimum(depth, wall)
    points = world.eye[:, None, None] + rays * depth
    flat = solid.ravel(), axis.ravel(), forth.reshape(3, -1), points.reshape(3, -1)
    normals, u, v, material, faces = _surfaces(world, *flat)
    fields = world.materials.T[:, material]
    length = np.sqrt((rays * rays).sum(0)).ravel()
    cosine = np.maximum(np.abs((rays.reshape(3, -1) * normals).sum(0)) / length, 0.08)
    footprint = depth.ravel() * pixel * length / cosine
    color = reflectance(fields, u, v, footprint)
    light = _light(world, points, normals, rays.reshape(3, -1) / length, fields[17])
    light = color * light[0] + light[1] + fields[18] * fields[0:3]
    objects = np.append(world.solid_object, -1)[solid]
    seen = (world.view @ normals).T.reshape(*depth.shape, 3)
    faces, shine = faces.reshape(depth.shape), fields[17].reshape(depth.shape)
    return light.T.reshape(*depth.shape, 3), depth, objects, faces, shine, seen


def _surfaces(world: World, solid: np.ndarray, axis: np.ndarray, forth: np.ndarray, points: np.ndarray):
    """At the points f32[3,N] that rays hit: normals f32[3,N], texture coordinates u, v, material and face, each [N]."""
    pixels = np.arange(len(solid))
    side = forth[axis, pixels]
    normals = np.zeros(points.shape, np.float32)
    normals[axis, pixels] = np.where(side, -1, 1)
    faces = 2 * axis + side
    material = world.faces[faces]
    u, v = np.where(axis == 0, points[1], points[0]), np.where(axis == 2, points[1], points[2])
    hit = np.nonzero(solid >= 0)[0]
    ids = solid[hit]
    solids, a = world.solids, world.solids.axes[ids]
    q = _apply(a, points[:, hit].T - solids.center[ids]).T
    kind, half = solids.kind[ids], solids.half[ids].T
    size = np.abs(q)
    round_part = np.where(kind == SPHERE, 1, np.where(size[2] > np.hypot(q[0], q[1]), 0, 1))
    face = size.argmax(0)
    curved = kind != BOX
    n = np.where(np.arange(3)[:, None] == face, np.sign(q), 0)
    n_curved = np.stack([q[0] * round_part, q[1] * round_part, np.where((kind == SPHERE) | (round_part == 0), q[2], 0)])
    n = np.where(curved, n_curved, n)
    world_n = np.stack(_turn(a.transpose(0, 2, 1), *n))
    normals[:, hit] = world_n / np.sqrt((world_n * world_n).sum(0))
    local = q * half
    flat_u, flat_v = np.where(face == 0, local[1], local[0]), np.where(face == 2, local[1], local[2])
    around = curved & (round_part == 1)
    u[hit] = np.where(around, np.arctan2(q[1], q[0]) * half[0], np.where(curved, local[0], flat_u))
    v[hit] = np.where(around, local[2], np.where(curved, local[1], flat_v))
    material[hit], faces[hit] = world.solid_material[ids], world.solid_face[ids]
    return normals, u, v, material, faces


def _light(world: World, points: np.ndarray, normals: np.ndarray, sight: np.ndarray, shine: np.ndarray):
    """Light that arrives at points f32[3,T,K], and highlights of shiny surfaces, both f32[3,N]."""
    flat = points.reshape(3, -1)
    room = world.room[:, None]
    corner = np.minimum(flat, room - flat)
    open_sky = (1 - 0.4 * (1 - np.abs(normals)) * np.exp(-5 * corner)).prod(0) * (0.85 + 0.15 * normals[2])
    diffuse = world.ambient[:, None] * open_sky
    highlight = np.zeros_like(diffuse)
    shiny = np.nonzero(shine)[0]
    low, high = points.min(2).T, points.max(2).T
    for light in world.lights:
        position, color = light[:3], light[3:, None]
        way = position[:, None] - flat
        squared = (way * way).sum(0)
        distance = np.sqrt(squared)
        cosine = np.maximum((way * normals).sum(0) / distance, 0)
        tile, solid = _shadow_pairs(world.solids, position, low, high)
        blocked, _ = nearest(world.solids, position, points - position[:, None, None], tile, solid)
        shadow = blocked.ravel() * distance < distance - _CONTACT
        strength = np.where(shadow, 0, 1 / (0.6 + squared))
        diffuse += color * (strength * cosine)
        if len(shiny):
            middle = way[:, shiny] / distance[shiny] - sight[:, shiny]
            middle /= np.sqrt((middle * middle).sum(0))
            glare = np.maximum((middle * normals[:, shiny]).sum(0), 0) ** 40
            highlight[:, shiny] += color * (strength[shiny] * glare * shine[shiny])
    return diffuse, highlight
