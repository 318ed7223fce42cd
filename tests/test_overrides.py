"""Configurations on a command line: every key, all stages, values as one types them, and what is said of wrong ones."""

import json
import re
from collections.abc import Sequence

import pytest
from config_files import load
from ml_collections import ConfigDict

from aitok_jax import tasks
from aitok_jax.command_line import overrides
from aitok_jax.config import flatten, from_text, ordered, stage_order, typed
from aitok_jax.training.keys import run_options

STAGES = ("tokenizer", "mask_tokenizer", "joint")


def overridden(config, *given):
    """What the overrides change: key -> value."""
    before = flatten(ordered(config))
    overrides.override(config, [tuple(each.split("=", 1)) for each in given], run_options)
    after = flatten(ordered(config))
    return {key: value for key, value in after.items() if key not in before or before[key] != value}


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("1e3", int, 1000),
        ("-1e-3", float, -0.001),
        ("3", float, 3.0),
        ("yes", bool, True),
        ("Off", bool, False),
        ("0", bool, False),
        ("none", str, "none"),
        ("none", str | None, None),
        ("7", str | None, "7"),
        ("a, (b", str, "a, (b"),
        ("'x y'", str, "x y"),
        ("", str, ""),
        ("none", tuple[int, int] | None, None),
        ("45, 471", tuple[int, int] | None, (45, 471)),
        ("(1, 2,)", Sequence[int], (1, 2)),
        ("[1e1,2]", Sequence[int], (10, 2)),
        ("5", Sequence[int], (5,)),
        ("()", tuple, ()),
        ("(true, no)", Sequence[bool], (True, False)),
        ("((mask, 5), (depth, 7))", tuple[tuple[str, int], ...], (("mask", 5), ("depth", 7))),
        ("{}", {}, {}),
        ("{name: linear, end_factor: 1e-2}", {}, {"name": "linear", "end_factor": 0.01}),
        ("{'a b': gs://bucket/run, c: 'x, y'}", {}, {"a b": "gs://bucket/run", "c": "x, y"}),
    ],
)
def test_values_as_one_types_them(text, kind, value):
    found = typed("key", from_text(text, kind), kind)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("1.5", int, "key=1.5 must be a whole number"),
        ("yes", int, "key=True must be a whole number"),
        ("inf", int, "key=inf must be a whole number"),
        ("nan", float, "key=nan must be a number"),
        ("much", float, "key=much must be a number"),
        ("2", bool, "key=2 must be true or false"),
        ("(1, 2, 3)", tuple[int, int] | None, "key=(1, 2, 3) must have 2 values"),
        ("{a: 1}", Sequence[int], "key={'a': 1} must be a list, such as (1, 2)"),
        ("4", {}, "key=4 must be a mapping, such as {} or {key: value}"),
    ],
)
def test_values_of_another_type(text, kind, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        typed("key", from_text(text, kind), kind)


@pytest.mark.parametrize(
    "name", ["nyu", "nyu:tokenizer=bins", "coco", "coco:task=detection", "joint", "vqvae_depth", "vqvae_mask"]
)
def test_every_field_of_a_task_can_be_set(name):
    """Whether the configuration has it or the code; and setting one changes the task."""
    config = load(*name.split(":"))
    before = tasks.build(config.task)
    for key, kind in flatten({"task": run_options(config)["task"]}).items():
        ((place, found, _),) = overrides._places(config, key, "", run_options)
        assert (".".join(place), found) == (key, kind)
    settings = {
        "joint": "task.parts.depth.blend=yes",
        "vqvae_depth": "task.max_depth=7",
        "vqvae_mask": "task.name=mask",
    }
    assert overridden(config, settings.get(name, "task.transformer.position_temperature=4"))
    assert name == "vqvae_mask" or repr(tasks.build(config.task)) != repr(before)


@pytest.mark.parametrize(
    ("name", "given", "changed"),
    [
        ("nyu", ["task.eval_crop=none"], {"task.eval_crop": None}),
        ("nyu", ["task.backbone.patch=8"], {"task.backbone.patch": 8}),
        ("nyu", ["task.file_scale=100"], {"task.file_scale": 100.0}),
        ("nyu", ["task.tokenizer.decay=.9"], {"task.tokenizer.decay": 0.9}),
        ("nyu", ["data.columns=41,601"], {"data.columns": (41, 601)}),
        ("nyu", ["data.render.train=1e1"], {"data.render.train": 10}),
        ("nyu", ["start_from.params=RUN"], {"start_from.params": "RUN"}),
        ("nyu", ["start_from=builtin"], {"start_from": "builtin"}),
        ("nyu", ["best_metric=none"], {"best_metric": None}),
        ("nyu", ["eval_variants.cold.soft_input=no"], {"eval_variants.cold.soft_input": False}),
        ("nyu", ["tokenizer=RUN"], {"tokenizer": "RUN", "start_from.model_state/depth_tokenizer": "RUN"}),
        ("nyu", ["all.batch_size=4"], {"batch_size": 4}),
        ("coco:task=detection", ["task.tokenizer={}", "task.tokenizer.hidden=4"], {"task.tokenizer.hidden": 4}),
        (
            "nyu",
            ["optim.schedule={name: exponential}", "optim.schedule.every=10"],
            {"optim.schedule.name": "exponential", "optim.schedule.every": 10},
        ),
        ("joint", ["data.depth.root=x"], {"data.depth.root": "x"}),
        ("joint", ["all.data.root=x"], {"data.depth.root": "x", "data.instances.root": "x"}),
        ("joint", ["task.backbone.drop_path=0"], {"task.shared.backbone.drop_path": 0.0}),
        ("joint", ["batch_size={depth: 1, instances: 2}"], {"batch_size.depth": 1, "batch_size.instances": 2}),
        ("joint", ["detection=RUN"], {"detection": "RUN", "start_from.params": "RUN"}),
    ],
)
def test_overrides(name, given, changed):
    assert overridden(load(*name.split(":")), *given) == changed


def test_a_key_of_all_stages_and_parts():
    changed = overridden(
        load("quickstart"), "all.optim.learning_rate=1e-5", "all.batch_size=4", "all.task.soft_input=no"
    )
    rates = {f"stages.{stage}.optim.learning_rate": 1e-5 for stage in STAGES}
    sizes = {f"stages.{stage}.batch_size": 4 for stage in STAGES[:2]}
    parts = ("depth", "instances")
    sizes |= {f"stages.joint.batch_size.{part}": 4 for part in parts}
    assert changed == rates | sizes | {f"stages.joint.task.parts.{part}.soft_input": False for part in parts}


def test_a_run_of_one_part_in_the_form_of_parts():
    """As a run's config.json has it, the keys of the file it came from are good too."""
    config = ordered(
        {
            "task": {"name": "solver", "shared": {"backbone": {}}, "parts": {"rooms": {"name": "depth"}}},
            "data": {"rooms": {"name": "nyu", "root": "x"}},
            "batch_size": {"rooms": 4},
        }
    )
    given = ("task.soft_input=no", "task.backbone.patch=8", "data.root=y", "batch_size=8")
    assert overridden(config, *given) == {
        "task.parts.rooms.soft_input": False,
        "task.shared.backbone.patch": 8,
        "data.rooms.root": "y",
        "batch_size.rooms": 8,
    }


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "quickstart",
            "optim.learning_rate=1e-4",
            "--config.optim.learning_rate is unknown: there are several stages; give "
            "--config.stages.joint.optim.learning_rate=1e-4, or --config.all.optim.learning_rate=1e-4 for all of them",
        ),
        (
            "quickstart",
            "learning_rate=2",
            "learning_rate is unknown; did you mean --config.stages.joint.optim.learning_rate=2?",
        ),
        ("quickstart", "stages.joint.train_step=2", "did you mean --config.stages.joint.train_steps=2?"),
        ("quickstart", "all.train_step=2", "did you mean --config.stages.joint.train_steps=2?"),
        (
            "joint",
            "data.root=x",
            "there are several parts; give --config.data.instances.root=x, or --config.all.data.root=x",
        ),
        ("nyu", "batch_sise=2", "--config.batch_sise is unknown; did you mean --config.batch_size=2?"),
        ("nyu", "soft_input=no", "did you mean --config.task.soft_input=no?"),
        ("finetune:depth", "train_steps=9", "--config.train_steps is unknown; did you mean --config.steps=9?"),
        ("nyu", "batch_size=few", "--config.batch_size=few must be a whole number, as in --config.batch_size=24"),
        ("nyu", "task.soft_input=maybe", "must be true or false, as in --config.task.soft_input=True"),
    ],
)
def test_what_is_said_of_a_wrong_one(name, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        overridden(load(*name.split(":")), given)


@pytest.mark.parametrize("arg", ["", ",parallel", ",normals", ",semantic"])
def test_the_quickstart_without_soft_tokens(arg):
    *_, solver = load("quickstart", f"soft=false{arg}").stages.values()
    parts = tasks.build(solver.task).parts
    assert [(part.soft_input, part.soft_detokenize, part.aux_weight) for part in parts.values()] == [
        (False, False, 0.0) for _ in parts
    ]
    assert not flatten(solver.eval_variants)


def test_arguments_of_a_command_line():
    rest, given = overrides._split(
        ["x", "--config=f.py", "--config.a=1=2", "-config.b", "3", "--noconfig.c", "--config.d"]
    )
    assert rest == ["x", "--config=f.py"]
    assert given == [("a", "1=2"), ("b", "3"), ("c", "false"), ("d", "true")]


def test_files(tmp_path):
    """Arguments go to get_config as they are; JSON is the configuration of a run."""
    (tmp_path / "mine.py").write_text("def get_config(arg='nothing'):\n    return {'z': arg, 'a': 1}\n")
    for given, arg in (("", "nothing"), (":", ""), (":soft=false,x", "soft=false,x")):
        config = overrides.load(f"{tmp_path}/mine.py{given}")
        assert list(config.items()) == [("z", arg), ("a", 1)]
    (tmp_path / "config.json").write_text(json.dumps({"z": [1], "a": {"b": 2}}))
    assert overrides.load(f"{tmp_path}/config.json").to_dict() == {"z": [1], "a": {"b": 2}}
    for text in ("[]", "{"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"config\.json is no configuration in JSON; give the config\.json of a run"
        ):
            overrides.load(f"{tmp_path}/config.json")


def test_stages_run_in_the_order_written():
    """Whatever ml_collections makes of it, but that a stage comes after those it reads from."""
    config = ConfigDict({"stages": {"z": {"x": 1}, "b": {"from": "{workdir}/m"}, "m": {"x": 1}, "a": {"x": 1}}})
    assert stage_order(ordered(config).stages) == ["z", "m", "b", "a"]
    circle = {"a": {"from": "{workdir}/b"}, "b": {"from": "{workdir}/a/best"}}
    with pytest.raises(ValueError, match="the stages a, b wait for each other"):
        stage_order(ordered(circle))
