"""A modality of two channels, defined in this file alone, is trained, evaluated, predicted, exported and resumed."""

import dataclasses
import io
import json
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from aitok_jax import Predictor, export, main
from aitok_jax.config import ordered
from aitok_jax.predict.__main__ import main as predict
from aitok_jax.tasks.modalities import MODALITIES, Modality
from aitok_jax.tasks.modalities.modality import Tile, masked_mean
from aitok_jax.training import checkpoint
from configs import common

SIZE, FRAMES, STEPS = 16, 300, 400


@dataclasses.dataclass(frozen=True)
class Flow(Modality):
    """Where a pixel moves, in pixels to the right and down; (0, 0) is not annotated."""

    name: ClassVar[str] = "flow"
    channels: ClassVar[int] = 2
    map_axes: ClassVar[tuple[int, ...]] = (2,)
    task_id: ClassVar[int] = 3
    objective: ClassVar[str] = "mse_annotated"
    unit: ClassVar[str] = "px"
    meaning: ClassVar[str] = "pixels to the right and down"
    headline: ClassVar[tuple[str, str]] = ("epe", "min")
    pair: ClassVar[str] = "flow_{}.npy"

    largest: float = 8.0

    def encode(self, map_):
        return map_

    def finish(self, raw_BHWC):
        return jnp.clip(raw_BHWC, -self.largest, self.largest)

    def valid(self, map_):
        return (map_ != 0).any(-1)

    def auxiliary(self, raw_BHWC, map_):
        valid = self.valid(map_)
        return {"epe_loss": jnp.sum(jnp.where(valid, self.error(raw_BHWC, map_), 0.0)) / jnp.maximum(valid.sum(), 1)}

    def mirror(self, map_):
        return map_ * np.array([-1, 1], np.float32).reshape((1,) * (len(map_.shape) - 1) + (2,))

    def error(self, prediction, map_):
        return jnp.sqrt(jnp.sum(jnp.square(jnp.asarray(prediction) - map_), -1) + 1e-12)

    def metrics(self, prediction, map_, valid_BHW):
        return {"epe": masked_mean(self.error(prediction, map_), valid_BHW)}

    def read(self, content):
        map_ = np.load(io.BytesIO(content))
        if map_.ndim != 3 or map_.shape[2] != 2:
            raise ValueError(f"flow must be [H, W, 2], got {map_.shape}")
        return map_.astype(np.float32)

    def write(self, target, map_):
        np.save(f"{target}_flow.npy", map_)

    def tiles(self, maps):
        return [Tile(np.linalg.norm(map_, axis=-1), {"vmin": 0, "vmax": self.largest}, "px") for map_ in maps]


def write_frames(folder, count, seed):
    """Squares on grey: green ones move down, others up, towards their red half; everything else moves by (0, 1)."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        image, flow = np.full((SIZE, SIZE, 3), 128, np.uint8), np.tile(np.float32([0, 1]), (SIZE, SIZE, 1))
        y, x = 4 * rng.integers(0, 3, 2)  # on the grid of the tokens
        right, down = rng.integers(0, 2, 2)
        image[y : y + 8, x : x + 8] = (0, 255 * down, 0)
        image[y : y + 8, x + 4 * right : x + 4 * right + 4, 0] = 255
        flow[y : y + 8, x : x + 8] = (6 * right - 3, 6 * down - 3)
        Image.fromarray(image).save(folder / f"rgb_{i:05}.jpg", quality=95)
        np.save(folder / f"flow_{i:05}.npy", flow)


def config(root):
    vqvae = {
        "hidden": 8,
        "downsample": 4,
        "num_res_blocks": 0,
        "num_codes": 16,
        "code_dim": 8,
        "restart_threshold": 0.1,
    }
    widths = {"dim": 16, "num_heads": 2, "hidden": 32, "encoder_layers": 1, "decoder_layers": 1, "max_length": 16}
    backbone = {"embed_dim": 16, "depths": (1,), "num_heads": (2,), "patch": 4}
    backbone |= {"windows": (4,), "pretrain_windows": (4,), "use_shift": (False,)}
    schedule = {"name": "cosine", "end_factor": 0.01}
    optim = common.optimizer(learning_rate=8e-3, clip_norm=1.0, warmup_steps=20, warmup_ratio=0.1, schedule=schedule)

    def run(name, task, recipe, steps, **fields):
        data = common.maps_data("flow", str(root), SIZE, recipe, test_subfolder="official_splits/test")
        sizes = {"batch_size": 8, "eval_batch_size": 8, "train_steps": steps, "log_every": 1, "checkpoint_every": 0}
        return common.run(name=name, task=task, data=data, optim=optim, **sizes, **fields).to_dict()

    solver = {
        "name": "flow",
        "image_size": SIZE,
        "normalize_image": True,
        "memory_weight": 1.0,
        "init_variance": 0.5,
        "backbone": backbone,
        "tokenizer": vqvae,
    }
    return ordered(
        {
            "stages": {
                "tokenizer": run(
                    "flow_tokenizer",
                    {"name": "flow_tokenizer", "image_size": SIZE, "mask_ratio": 0.0, "tokenizer": vqvae},
                    "tokenizer",
                    STEPS,
                ),
                "flow": run(
                    "flow",
                    {
                        **solver,
                        "transformer": {**widths, "position_temperature": 4.0, "dropout": 0.0, "drop_path": 0.0},
                        "largest": 8.0,
                    },
                    "solver",
                    STEPS,
                    start_from={"model_state/flow_tokenizer": "{workdir}/tokenizer"},
                    eval_variants={"flow_hard": common.HARD},
                    eval_baseline=True,
                ),
            }
        }
    ).lock()


@pytest.fixture(scope="module")
def flow():
    MODALITIES["flow"] = Flow
    yield
    del MODALITIES["flow"]


@pytest.fixture(scope="module")
def trained(flow, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow")
    write_frames(folder / "data" / "room", FRAMES, 0)
    write_frames(folder / "data" / "official_splits" / "test" / "room", 8, 1)
    return folder, main.run(config(folder / "data"), folder / "run")


def test_both_stages_learn(trained):
    _, metrics = trained
    assert metrics["flow_tokenizer/epe"] < 0.65 * metrics["baseline/epe"]
    assert metrics["flow/epe"] < 0.9 * metrics["baseline/epe"]
    assert metrics["flow_hard/epe"] > 0
    assert -1 <= metrics["flow/confidence_spearman"] <= 1


def test_training_logs_the_auxiliary_loss_and_writes_panels(trained):
    folder, _ = trained
    lines = [json.loads(line) for line in (folder / "run/flow/metrics.jsonl").read_text().splitlines()]
    losses = [line["epe_loss"] for line in lines if "epe_loss" in line]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert len(list((folder / "run/flow/panels").glob("*.png"))) == 8


def test_prediction_and_its_command(trained):
    folder, _ = trained
    predictor = Predictor.load(folder / "run/flow")
    assert predictor.tasks == ("flow",)
    image = np.zeros((SIZE, 2 * SIZE, 3), np.uint8)
    for augment in (False, True):
        result = predictor(image, augment=augment)
        assert result["flow"].shape == (SIZE, 2 * SIZE, 2)
        assert result["confidence"].shape == (SIZE, 2 * SIZE)
        if not augment:
            np.testing.assert_allclose(
                result["flow"][:, ::-1, 0], -result["flow"][..., 0], atol=1e-4
            )  # it is its mirror
    Image.fromarray(image).save(folder / "dark.png")
    words = [f"--checkpoint={folder / 'run/flow'}", f"--image={folder / 'dark.png'}", f"--out={folder / 'predicted'}"]
    assert predict(words) == 0
    np.testing.assert_allclose(np.load(folder / "predicted/dark_flow.npy"), predictor(image)["flow"], atol=1e-5)
    assert (folder / "predicted/dark_panel.png").stat().st_size
    with pytest.raises(SystemExit):
        predict([*words, "--ply_fov=60"])


def test_export(trained):
    folder, _ = trained
    predictor = Predictor.load(folder / "run/flow")
    description = export.export(predictor, folder / "exported", size=(SIZE, 2 * SIZE))
    assert description["outputs"]["flow"]["meaning"] == "pixels to the right and down"
    assert max(export.compare(predictor, folder / "exported").values()) < 1e-5


def test_a_longer_run_goes_on(trained):
    folder, _ = trained
    longer = config(folder / "data").copy_and_resolve_references()
    with longer.unlocked():
        longer.stages.flow.train_steps = STEPS + 2
    metrics = main.run(longer, folder / "run")
    assert checkpoint.latest_step(folder / "run/flow") == STEPS + 2
    assert metrics["flow/epe"] > 0


def test_a_file_that_holds_something_else_is_named(flow, tmp_path):
    write_frames(tmp_path / "room", 2, 0)
    np.save(tmp_path / "room" / "flow_00001.npy", np.zeros((SIZE, SIZE)))
    write_frames(tmp_path / "official_splits" / "test" / "room", 8, 1)
    with pytest.raises(ValueError, match=r"flow_00001\.npy: flow must be \[H, W, 2\]"):
        main.run(config(tmp_path), tmp_path / "run")
