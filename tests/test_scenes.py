"""Built-in scenes: geometry against known answers, the promises of `render`, and the files that `write` leaves."""

import dataclasses
import itertools
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from aitok_jax.data import scenes
from aitok_jax.scenes import raycast, rooms
from aitok_jax.scenes import render as rendering
from aitok_jax.scenes.furniture import CLASSES, Dice
from aitok_jax.scenes.raycast import BOX, CYLINDER, SPHERE, Material, Solids, World, hit_distance, trace
from aitok_jax.scenes.rooms import sample_room

SEEDS = range(25)


@pytest.fixture(scope="module")
def rendered():
    return [scenes.render(seed, 96, 128) for seed in SEEDS]


def _hit(kind, origin, direction):
    parts = tuple(np.array([[value]], np.float32) for value in direction)
    return float(hit_distance(kind, np.array([origin], np.float32), parts)[0, 0])


@pytest.mark.parametrize(
    ("kind", "origin", "direction", "distance"),
    [
        (BOX, (-3, 0.5, -0.5), (1, 0, 0), 2),
        (BOX, (-3, 0.5, -0.5), (2, 0, 0), 1),  # in multiples of the ray
        (BOX, (-3, -3, 0), (1, 1, 0), 2),
        (BOX, (-3, 1.5, 0), (1, 0, 0), np.inf),
        (BOX, (-3, 0, 0), (-1, 0, 0), np.inf),  # behind
        (SPHERE, (-3, 0, 0), (1, 0, 0), 2),
        (SPHERE, (-3, 0.6, 0), (1, 0, 0), 3 - 0.8),
        (SPHERE, (-3, 0.8, 0.8), (1, 0, 0), np.inf),
        (CYLINDER, (0, -3, 0.9), (0, 1, 0), 2),
        (CYLINDER, (0.6, -3, 0.9), (0, 1, 0), 3 - 0.8),
        (CYLINDER, (0, -3, 1.1), (0, 1, 0), np.inf),  # above the lid
        (CYLINDER, (0.5, 0.5, 4), (0, 0, -1), 3),  # onto the lid
        (CYLINDER, (0.8, 0.8, 4), (0, 0, -1), np.inf),  # past its rim, inside its box
        (CYLINDER, (-3, 0, 3), (1, 0, -1), 2),  # touches the edge of the lid
    ],
)
def test_hit_distance(kind, origin, direction, distance):
    assert _hit(kind, origin, direction) == pytest.approx(distance, rel=1e-5)


def _world(solids=(), light=(2.0, 1.0, 2.8)) -> World:
    """A room of 4 x 6 x 3 m seen from (2, 1, 1.5) along +y; `solids` are (kind, center, half, yaw)."""
    kind, center, half, yaw = zip(*solids, strict=True) if solids else ((), np.zeros((0, 3)), np.zeros((0, 3)), ())
    return World(
        room=np.array([4, 6, 3], np.float32),
        faces=np.zeros(6, int),
        solids=Solids(np.array(kind, int), *(np.array(a, np.float32) for a in (center, half, yaw))),
        solid_object=np.arange(len(kind)),
        **dict.fromkeys(("solid_face", "solid_material"), np.zeros(len(kind), int)),
        materials=np.array([Material((0.5, 0.5, 0.5), grain=0).row()], np.float32),
        lights=np.array([[*light, 5, 5, 5]], np.float32),
        ambient=np.full(3, 0.1, np.float32),
        eye=np.array([2, 1, 1.5], np.float32),
        view=np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], np.float32),
    )


def test_trace_gives_distance_along_the_optical_axis():
    ball = (SPHERE, (2, 3, 1.5), (0.5, 0.5, 0.5), 0)
    turned_box = (BOX, (3, 4, 1.5), (0.5, 0.5, 0.1), np.pi / 4)
    behind_the_wall = (SPHERE, (0, 8, 1.5), (1, 1, 1), 0)
    frame = trace(_world([ball, turned_box, behind_the_wall]), 121, 161)
    focal = 2 / np.sqrt(3) * 121
    np.testing.assert_allclose(frame.depth[60, 80], 1.5, rtol=1e-5)  # the front of the ball
    np.testing.assert_allclose(frame.depth[20, 60:100], 5, rtol=1e-5)  # the whole far wall is 5 m away, also aside
    below = np.arange(110, 121) - 60
    np.testing.assert_allclose(frame.depth[110:, 80], 1.5 * focal / below, rtol=1e-5)  # the floor is 1.5 m lower
    edge = 80 + round(focal / (3 - np.sqrt(0.5)))  # the nearest edge of the box is 1 m to the right
    assert frame.depth[60, edge] == pytest.approx(3 - np.sqrt(0.5), abs=0.02)
    assert frame.objects[60, 80] == 0
    assert frame.objects[60, edge] == 1
    assert set(np.unique(frame.objects)) == {-1, 0, 1}


def test_solids_throw_shadows():
    board = (BOX, (2, 4.5, 2), (0.5, 0.5, 0.02), 0)
    light = (2.0, 4.5, 2.8)
    free, shaded = trace(_world(light=light), 120, 160), trace(_world([board], light), 120, 160)
    floor = slice(104, 120)  # rows that see the floor; the board shades it for 1.75 m around
    np.testing.assert_array_equal(shaded.depth[floor], free.depth[floor])
    assert (shaded.light[floor, 60:100] < 0.6 * free.light[floor, 60:100]).all()
    np.testing.assert_array_equal(shaded.light[:40, :20], free.light[:40, :20])  # nothing is between light and ceiling


def test_lights_matter_and_fade_with_distance():
    near, far = trace(_world(light=(2, 5.0, 2)), 60, 80), trace(_world(light=(2, 1.5, 2)), 60, 80)
    dark = dataclasses.replace(_world(), lights=np.zeros((0, 6), np.float32))
    middle = (slice(25, 35), slice(30, 50))  # of the far wall
    assert near.light[middle].mean() > 2 * far.light[middle].mean() > 2 * trace(dark, 60, 80).light[middle].mean()


def test_culling_changes_nothing(monkeypatch):
    past_the_camera = (BOX, (2.4, 1, 0.5), (5, 0.05, 0.05), np.arctan2(4.9, 1))  # from behind left to the front right
    worlds = [_world([past_the_camera]), *(sample_room(np.random.default_rng(seed))[0] for seed in range(6))]
    culled = [trace(world, 48, 64) for world in worlds]

    def everything(solids, *_):
        return np.tile(np.array([-np.inf, -np.inf, np.inf, np.inf], np.float32), (len(solids.kind), 1))

    monkeypatch.setattr(raycast, "screen_rectangles", everything)
    monkeypatch.setattr(raycast, "_shadow_pairs", lambda s, _, low, high: np.ones((len(low), len(s.kind))).nonzero())
    for world, frame in zip(worlds, culled, strict=True):
        full = trace(world, 48, 64)
        np.testing.assert_array_equal(full.depth, frame.depth)
        np.testing.assert_array_equal(full.objects, frame.objects)
        np.testing.assert_array_equal(full.light, frame.light)


def test_textures_are_metric():
    tiles = Material((1, 1, 1), cell_u=0.3, cell_v=0.3, checker_u=1.0, checker_v=1.0, grain=0)
    u = np.array([0.15, 0.45, 0.75, 0.15], np.float32)
    v = np.array([0.15, 0.15, 0.15, 0.45], np.float32)
    fields = np.repeat(np.array([tiles.row()], np.float32).T, 4, axis=1)
    sharp = raycast.reflectance(fields, u, v, np.full(4, 1e-3, np.float32))
    np.testing.assert_allclose(sharp[0], [1, 0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(raycast.reflectance(fields, u, v, np.full(4, 30, np.float32))[0], 0.5, atol=0.02)


def test_walls_and_floor_show_their_texture_in_metres():
    checker = Material((1, 1, 1), cell_u=0.5, cell_v=0.5, checker_u=1.0, checker_v=1.0, grain=0)
    materials, lights = np.array([checker.row()], np.float32), np.zeros((0, 6), np.float32)
    box = (BOX, (2, 4.1, 1.5), (1, 0.1, 1), 0)
    frame = trace(dataclasses.replace(_world([box]), materials=materials, lights=lights), 120, 160)
    x, z = (np.arange(160) - 79.5) / (2 / np.sqrt(3) * 120), (59.5 - np.arange(120)) / (2 / np.sqrt(3) * 120)
    rays = np.stack(np.broadcast_arrays(x, 1.0, z[:, None]), -1)
    points = np.array([2, 1, 1.5]) + rays * frame.depth[..., None]
    on_side, on_floor = (points[..., 0] < 0.01) | (points[..., 0] > 3.99), points[..., 2] < 0.01
    # The texture of a solid starts at its middle, here (2, 1.5), which is as good as (0, 0.5).
    for pixels, axes, start in (
        (points[..., 1] > 5.99, (0, 2), 0.0),
        (on_floor, (0, 1), 0.0),
        (on_side, (1, 2), 0.0),
        (frame.objects == 0, (0, 2), (0.0, 0.5)),
    ):
        uv = (points[pixels][:, axes] - start) / 0.5
        clear = (np.abs(uv - np.round(uv)) > 0.15).all(1)  # of the edges of the cells
        white = np.floor(uv).sum(1) % 2 == 0
        assert clear.sum() > 100
        assert ((frame.light[pixels][:, 0] > 0.03) == white)[clear].mean() > 0.97


def test_render_is_a_function_of_its_arguments():
    first, again, other = (scenes.render(seed, 48, 64) for seed in (5, 5, 6))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first.image != other.image).any()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_same_room_at_every_size(seed):
    small, large = scenes.render(seed, 60, 80), scenes.render(seed, 180, 240)
    middles = large.depth[1::3, 1::3]  # three pixels to one: these have the same centre
    assert (np.abs(small.depth - middles) < 1e-3).mean() > 0.999
    assert ((small.sensor_depth == 0) == (large.sensor_depth[1::3, 1::3] == 0)).mean() > 0.8
    blobs = [rendering._blobs(np.random.default_rng(seed), *size) for size in ((60, 80), (180, 240))]
    np.testing.assert_allclose(blobs[0], blobs[1][1::3, 1::3], atol=1e-4)
    colors = large.image.reshape(60, 3, 80, 3, 3).mean((1, 3))
    assert np.abs(colors - small.image).mean() < 10


def test_shapes_and_types(rendered):
    for scene in rendered:
        count = len(scene.classes)
        assert 1 <= count <= 10
        for array, shape, dtype in (
            (scene.image, (96, 128, 3), np.uint8),
            (scene.depth, (96, 128), np.float32),
            (scene.sensor_depth, (96, 128), np.float32),
            (scene.normals, (96, 128, 3), np.float32),
            (scene.masks, (count, 96, 128), np.bool_),
            (scene.boxes, (count, 4), np.float32),
            (scene.classes, (count,), np.int32),
        ):
            assert array.shape == shape
            assert array.dtype == dtype
        assert 20 < scene.image.mean() < 235
        assert scene.image.std() > 10


def test_depth_in_range(rendered):
    for scene in [*rendered, *(scenes.render(seed, 32, 64) for seed in range(100, 130))]:
        assert scene.depth.min() > 0.5
        assert scene.depth.max() < 10


def test_rooms_keep_their_distance():
    """Where image corners do not reach: all of the room within 10 m, all objects from 0.6 m on."""
    bits = (np.arange(8)[:, None] >> np.arange(3)) & 1
    for seed in range(150):
        camera = rooms._camera(Dice(np.random.default_rng(seed)), (9, 9, 3))
        if camera is not None:
            assert ((np.array([9, 9, 3]) * bits - camera.eye) @ camera.view[2]).max() < 10
        world, classes = sample_room(np.random.default_rng(seed))
        parts = world.solids.corners()[world.solid_object >= 0]
        assert ((parts - world.eye) @ world.view[2]).min() > 0.58
        assert (parts > -0.01).all()
        assert (parts < world.room + 0.01).all()
        assert 3 <= len(classes) <= 10
        assert set(world.solid_object) == {-1, *range(len(classes))}


def test_sensor_depth_has_holes_where_sensors_do(rendered):
    at_edges = []
    for scene in rendered:
        holes = scene.sensor_depth == 0
        assert 0.05 <= holes.mean() <= 0.25
        np.testing.assert_array_equal(scene.sensor_depth[~holes], scene.depth[~holes])
        jump = np.zeros_like(holes)
        jump[:, :-1] = scene.depth[:, :-1] > 1.2 * scene.depth[:, 1:]  # pixels just left of something much nearer
        at_edges.append(holes[jump].mean() if jump.any() else 1.0)
    assert np.mean(at_edges) > 0.7


def test_masks_are_disjoint_and_boxes_tight(rendered):
    for scene in rendered:
        assert scene.masks.sum(0).max() == 1
        for mask, box in zip(scene.masks, scene.boxes, strict=True):
            y, x = np.nonzero(mask)
            np.testing.assert_array_equal(box, [x.min(), y.min(), x.max() + 1, y.max() + 1])


def test_masks_show_objects(rendered):
    """Where the mask of an object ends, depth jumps more often than elsewhere."""
    inside, outline = [], []
    for scene in rendered:
        jump = np.abs(np.diff(scene.depth, axis=1)) > 0.05
        owner = np.where(scene.masks.any(0), scene.masks.argmax(0), -1)
        border = owner[:, 1:] != owner[:, :-1]
        outline.append(jump[border].mean())
        inside.append(jump[~border].mean())
    assert np.mean(outline) > max(0.5, 5 * np.mean(inside))


def test_variety(rendered):
    assert len(CLASSES) >= 6
    assert {label for scene in rendered for label in scene.classes.tolist()} == set(range(len(CLASSES)))
    depth = np.stack([scenes.render(seed, 24, 32).depth for seed in range(200, 280)])
    baseline = np.sqrt(((depth[60:] - depth[:60].mean(0)) ** 2).mean())
    assert 0.9 < baseline < 1.8  # metres; a mean depth map must not do


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1, 48, 64), "seed=-1"), ((0, 48, 97), "width=97"), ((0, 15, 20), "height=15")],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        scenes.render(*arguments)


def test_speed():
    """0.13 s on one core where this was measured; the limit leaves room for slow and busy machines."""
    scenes.render(0, 480, 640)
    seconds = []
    for seed in range(3):
        start = time.perf_counter()
        scenes.render(seed, 480, 640)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.5


def test_seeds_of_splits_never_meet():
    ranges = sorted(
        (scenes._scene_seed(split, seed, 0), scenes._scene_seed(split, seed, scenes._SEEDS_PER_SPLIT - 1))
        for split in ("train", "test")
        for seed in range(4)
    )
    assert all(last < first for (_, last), (first, _) in itertools.pairwise(ranges))


SETTINGS = {"train": 3, "test": 2, "height": 48, "width": 64, "seed": 1}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    scenes.write(root, **SETTINGS, workers=1)
    return root


@pytest.mark.parametrize(("split", "folder"), [("train", "scene_0000"), ("test", "official_splits/test/room")])
def test_depth_files(written, split, folder):
    lines = (written / f"{split}.txt").read_text().splitlines()
    assert lines == [f"/{folder}/rgb_{i:05d}.jpg /{folder}/sync_depth_{i:05d}.png" for i in range(SETTINGS[split])]
    for index, line in enumerate(lines):
        rgb, sensor = ((written / path[1:]) for path in line.split())
        scene = scenes.render(scenes._scene_seed(split, 1, index), 48, 64)
        image = np.asarray(Image.open(rgb))
        assert image.shape == (48, 64, 3)
        assert np.abs(image.astype(int) - scene.image).mean() < 6
        exact = sensor.with_name(sensor.name.replace("sync", "exact"))
        for path, depth in ((sensor, scene.sensor_depth), (exact, scene.depth)):
            png = Image.open(path)
            assert png.mode == "I;16"
            np.testing.assert_allclose(np.asarray(png) / 1000, depth, atol=5.01e-4)


@pytest.mark.parametrize("split", ["train", "test"])
def test_annotation_files(written, split, capsys):
    from pycocotools.coco import COCO

    coco = COCO(written / "annotations" / f"instances_{split}.json")
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert len(coco.getImgIds()) == SETTINGS[split]
    for index, image in enumerate(coco.loadImgs(sorted(coco.getImgIds()))):
        assert (written / image["file_name"]).is_file()
        scene = scenes.render(scenes._scene_seed(split, 1, index), 48, 64)
        annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert len(annotations) == len(scene.classes)
        for annotation, mask, box, label in zip(annotations, scene.masks, scene.boxes, scene.classes, strict=True):
            np.testing.assert_array_equal(coco.annToMask(annotation), mask)
            assert annotation["area"] == mask.sum()
            x, y, w, h = annotation["bbox"]
            assert [x, y, x + w, y + h] == box.tolist()
            assert annotation["category_id"] == label + 1
            assert annotation["iscrowd"] == 0
            assert isinstance(annotation["segmentation"]["counts"], str)


def _contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_ensure_renders_once(written, monkeypatch):
    monkeypatch.setattr(scenes, "_run", lambda *_: pytest.fail("rendered again"))
    scenes.ensure(written, **SETTINGS)


@pytest.mark.parametrize("change", [{"train": 4}, {"width": 80}, {"seed": 2}, {"format": "coco"}])
def test_ensure_refuses_other_settings(written, change):
    before = _contents(written)
    with pytest.raises(ValueError, match="other settings"):
        scenes.ensure(written, **(SETTINGS | change))
    assert _contents(written) == before


def test_write_refuses_other_folders(tmp_path):
    (tmp_path / "train.txt").write_text("mine")
    with pytest.raises(ValueError, match="no built-in scenes"):
        scenes.write(tmp_path, **SETTINGS)
    assert _contents(tmp_path) == {"train.txt": b"mine"}


@pytest.mark.parametrize("change", [{"train": -1}, {"width": 8}, {"seed": -1}, {"format": "voc"}, {"workers": 0}])
def test_write_refuses_wrong_options(tmp_path, change):
    with pytest.raises(ValueError, match=str(next(iter(change.values())))):
        scenes.write(tmp_path / "new", **(SETTINGS | change))
    assert not (tmp_path / "new").exists()


def test_a_crash_is_made_good(written, tmp_path, monkeypatch):
    def crash(job):
        if job.index == 4:
            raise RuntimeError("power cut")
        return original(job)

    original = scenes._write_scene
    with monkeypatch.context() as patch:
        patch.setattr(scenes, "_write_scene", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            scenes.write(tmp_path, **(SETTINGS | {"height": 60, "train": 5}), workers=1)
    assert not (tmp_path / "scenes.json").exists()
    scenes.ensure(tmp_path, **SETTINGS, workers=1)
    assert _contents(tmp_path) == _contents(written)


def test_command_with_two_processes(written, tmp_path):
    options = [f"--{name}={value}" for name, value in SETTINGS.items()]
    command = [sys.executable, "-m", "aitok_jax.data.scenes", str(tmp_path / "new"), *options, "--workers=2"]
    subprocess.run(command, check=True, capture_output=True)
    assert _contents(tmp_path / "new") == _contents(written)


@pytest.mark.parametrize(("format", "absent"), [("nyu", "annotations"), ("coco", "train.txt")])
def test_formats(tmp_path, format, absent):
    scenes.write(tmp_path, train=1, test=1, height=16, width=16, workers=1, format=format)
    assert not (tmp_path / absent).exists()
    assert bool(list(tmp_path.rglob("*.png"))) == (format == "nyu")
    assert json.loads((tmp_path / "scenes.json").read_text())["format"] == format


def test_renderer_is_light():
    """Workers start quickly, and never touch an accelerator."""
    code = "import sys, aitok_jax.data.scenes; print([m for m in ('jax', 'tensorflow', 'flax') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
