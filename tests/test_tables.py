"""The tables of the paper as data: rows become runs, what they share is one run, and every published set-up builds."""

import csv
import dataclasses
import io
import re
import statistics
from pathlib import Path

import config_files
import jax
import jax.numpy as jnp
import plan
import pytest
import report
import setups
import tables

from aitok_jax import tasks
from aitok_jax.training import checkpoint, warm_start

PUBLISHED = {0.305, 0.934, 0.301, 0.940, 0.318, 0.932, 0.433, 0.342, 0.436, 0.311, 0.422, 0.341, 0.310}
RESULTS = Path(tables.__file__).with_name("results")
ARGUMENTS = {
    "vqvae_depth": (None, "num_codes=64", "hidden=32", "downsample=16", "res_blocks=0", "mask_ratio=0"),
    "vqvae_mask": (None, "num_codes=64", "hidden=32", "downsample=8", "res_blocks=4"),
    "nyu": (None, "parallel", "soft=false", "backbone=swin_l", "backbone=swin_l,parallel", "tokenizer=bins"),
    "coco": (None, "soft=false", "task=detection", "backbone=swin_l"),
    "joint": (None, "soft=false"),
}


def at(scale):
    return setups.SCALES[scale][0]()


def planned(*names, seeds=1, scale="scenes"):
    return plan.make_plan(names or list(tables.TABLES), scale, seeds, at(scale), setups.SCALES[scale][1])


def batch(task):
    """Shapes of what a task trains on."""
    batches = {}
    for part_name, part in task.parts.items():
        size = part.image_size
        shapes = {"image": (1, size, size, 3), "depth": (1, size, size), "instance": (1, size, size)}
        batches[part_name] = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    return batches


def variables(config):
    """Shapes of (params, model_state) of a fresh run."""
    task = tasks.build(config.task)
    params, state = jax.eval_shape(lambda: task.init(jax.random.key(0), batch(task)))
    return {"params": params, "model_state": state}


def leaves(tree, prefix=""):
    """Path -> shape below a prefix; all of the tree where it has no such path, as `warm_start.merge` has it."""
    for name in prefix.split("/") if prefix else []:
        tree = tree.get(name, {}) if isinstance(tree, dict) else {}
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in paths}


def shallow(task):
    """Leaves one block of each kind, which is quicker to trace; blocks are alike."""
    shared = task.get("shared", task)
    if "backbone" in shared:
        shared.backbone.depths = (1,) * len(shared.backbone.depths)
        shared.transformer.encoder_layers = shared.transformer.decoder_layers = 1


@pytest.mark.parametrize("name", ARGUMENTS)
def test_published_setups_build(name):
    sizes = [leaves(variables(config_files.load(name, arg))) for arg in ARGUMENTS[name]]
    assert all(sizes)
    assert len({str(shapes) for shapes in sizes}) > 1 or name == "joint"


@pytest.mark.parametrize("scale", setups.SCALES)
def test_every_run_fits_what_it_starts_from(scale):
    names = [name for name, table in tables.TABLES.items() if set(table.runs) & set(setups.SCALES[scale][1])]
    jobs, made = planned(*names, scale=scale).jobs, {"builtin": checkpoint.load_inference("builtin")[1]}
    for folder, job in jobs.items():
        shallow(job.config.task)
        task = str(job.config.task)
        made[folder] = made[task] = made.get(task) or variables(job.config)
        for prefix, source in job.config.start_from.items():
            needed = source.rpartition("/")[2]
            if needed not in (*jobs, "builtin"):
                continue
            ours = leaves(made[folder], prefix)
            theirs = leaves(made[needed], prefix) or leaves(made[needed])
            both = ours.keys() & theirs.keys()
            assert both == ours.keys() or prefix == "params", (folder, prefix, ours.keys() - both)
            for path in both:
                grown = any(table in path for table in warm_start.VOCABULARY_TABLES)
                assert ours[path][grown:] == theirs[path][grown:], (folder, prefix, path)
                assert not grown or ours[path][0] >= theirs[path][0]


def test_what_rows_have_in_common_is_one_run():
    jobs = planned("1", "3", "8", seeds=2).jobs
    base = at("scenes")["depth_tokenizer"]
    same = [job for job in jobs.values() if job.config.task == base.task and job.config.seed == 1]
    assert len(same) == 1
    both = planned("7", "10").jobs
    assert len(both) == len(planned("7").jobs) + 1  # the joint model; its tokenizers and the rest are there
    assert sum(job.config.name == "detection" for job in planned("7", seeds=3).jobs.values()) == 1


def test_uses_of_inference_are_evaluated_on_the_same_weights():
    result = planned("7")
    trained = [job for job in result.jobs.values() if not job.weights and job.config.name == "depth"]
    assert sorted(job.config.task.aux_weight for job in trained) == [0.0, 3.0]
    switches = {}
    for row in tables.TABLES["7"].rows:
        (folder,) = [folder for folder in result.cells["7", row.label, 0] if folder.startswith("depth-")]
        job = result.jobs[folder]
        task = job.config.task
        assert not job.weights or result.jobs[job.weights].config.task.aux_weight == task.aux_weight
        switches[row.label] = (task.soft_input, task.soft_detokenize, task.aux_weight > 0)
    assert switches == {
        "none": (False, False, False),
        "next-token input": (True, False, False),
        "detokenizer": (False, True, False),
        "auxiliary loss": (False, False, True),
        "all": (True, True, True),
    }


def test_the_joint_model_of_coco_brings_its_depth_tokenizer():
    folders = planned("10", scale="coco").cells["10", "joint", 0]
    assert [folder.partition("-")[0] for folder in folders] == ["joint"]
    names = {job.config.name for job in planned("10", scale="coco").jobs.values()}
    assert names == {"mask_tokenizer", "detection", "instances", "depth_tokenizer", "joint"}


@pytest.mark.parametrize("scale", setups.SCALES)
def test_runs_have_the_names_that_the_columns_ask_for(scale):
    """Metrics begin with the name of the config."""
    for name, config in at(scale).items():
        assert config.name == {"bins": "depth"}.get(name, name)
        assert config.best_metric.partition("/")[0] in ("", config.name, "instances")


def test_jobs_come_after_those_they_need():
    jobs = planned(seeds=2).jobs
    order = list(jobs)
    for folder, job in jobs.items():
        assert all(order.index(needed) < order.index(folder) for needed in job.needs)


def test_wrong_tables_and_keys_are_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"'12' is unknown; .*valid: 1, 10"):
        planned("12")
    with pytest.raises(ValueError, match=r"--table=B has no row at --scale=coco"):
        planned("B", scale="coco")
    wrong = dataclasses.replace(tables.TABLES["9"], rows=(tables.Row("x", {"depth": {"task.softinput": 1}}),))
    monkeypatch.setitem(tables.TABLES, "9", wrong)
    with pytest.raises(ValueError, match=r"task.softinput: .*did you mean 'soft_input'"):
        planned("9")


def test_published_values_are_those_of_the_specification():
    given = {value for table in tables.TABLES.values() for row in table.rows for value in row.published.values()}
    assert given == PUBLISHED
    for name, table in tables.TABLES.items():
        labels = [row.label for row in table.rows]
        assert len(set(labels)) == len(labels)
        for scale, (_, runs) in setups.SCALES.items():
            if set(table.runs) & set(runs):
                assert tables.at_scale(table.reference, scale) in labels, name


def result(value, aux):
    environment = {"commit": "abc", "versions": dict.fromkeys(("jax", "flax", "optax"), "1"), "seconds": 1800.0}
    environment |= {"finished": "2026-01-01", "devices": {"count": 2, "kind": "cpu"}}
    return {"metrics": {"depth/rmse": value, "depth/d1": aux}, **environment}


def test_report_marks_only_what_all_seeds_agree_on(tmp_path):
    runs = planned("9", seeds=3)
    values = {
        "autoregressive": ((0.50, 0.9), (0.54, 0.8), (0.52, 0.7)),
        "parallel": ((0.49, 0.6), (0.48, 0.5), (0.4, 0.95)),
    }
    results = {}
    for (_, row, seed), folders in runs.cells.items():
        (folder,) = [name for name in folders if name.startswith("depth-")]
        results[folder] = result(*values[row][seed])
    (path,) = report.write(runs, results, tmp_path, "scenes")
    text = path.read_text()
    assert "| autoregressive | 0.520 ± 0.020 | 0.305 | 0.800 ± 0.100 | 0.934 |" in text
    assert "| parallel | 0.457 ± 0.049 ▲ | 0.301 | 0.683 ± 0.236 | 0.940 |" in text
    assert re.search(r"3 seeds · 6 of 9 runs · 3\.00 h .* · 2026-01-01 · abc · jax 1", text)
    lines = list(csv.DictReader(io.StringIO(path.with_suffix(".csv").read_text())))
    assert len(lines) == 12
    assert {line["value"] for line in lines if line["row"] == "parallel"} == {
        "0.49",
        "0.48",
        "0.4",
        "0.6",
        "0.5",
        "0.95",
    }
    assert path.with_suffix(".png").stat().st_size > 2000


def test_report_of_what_is_finished(tmp_path):
    (path,) = report.write(planned("9"), {}, tmp_path, "scenes")
    assert "Nothing is finished" in path.read_text()


@pytest.mark.parametrize("name", tables.TABLES)
def test_the_readme_shows_what_was_reported(name):
    """Every row, by three seeds, and its text is the one written beside the numbers."""
    with (RESULTS / f"table_{name}.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {(line["row"], line["seed"]) for line in lines} == {
        (row.label, str(seed)) for row in tables.TABLES[name].rows for seed in range(3)
    }
    text = (RESULTS / f"table_{name}.md").read_text().strip()
    assert text in RESULTS.with_name("README.md").read_text()
    for line in lines:
        values = [
            float(other["value"]) for other in lines if (other["row"], other["column"]) == (line["row"], line["column"])
        ]
        row = next(shown for shown in text.splitlines() if shown.startswith(f"| {line['row']} |"))
        assert f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" in row
    assert (RESULTS / f"table_{name}.png").stat().st_size > 5000
