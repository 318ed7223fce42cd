"""The notebooks in colabs/: each is the executed pair of its script, and runs from top to bottom."""

import json
import runpy
import shutil
import subprocess
import sys
from importlib import metadata, util
from types import SimpleNamespace

import build_notebooks
import nbformat
import pytest

COLABS = build_notebooks.COLABS
FIGURES = {"predict": 4, "tokenizers": 4, "train_tiny": 2}
SHORTER = {"train_tiny": ("STEPS, SCENES = 300, 1000", "STEPS, SCENES = 60, 60")}  # of what a reader runs
names = pytest.mark.parametrize("name", FIGURES)


def _figures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    return sum(kind.startswith("image/") for kind in kinds)


def test_every_notebook_is_tested():
    assert {path.stem for path in COLABS.glob("*.ipynb")} == {path.stem for path in COLABS.glob("*.py")} == set(FIGURES)


@names
def test_the_notebook_is_the_executed_script(name):
    notebook = nbformat.read(COLABS / f"{name}.ipynb", as_version=4)
    script = build_notebooks.read(COLABS / f"{name}.py")
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in script.cells]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert _figures(notebook) == FIGURES[name]


@pytest.mark.notebook
@names
def test_the_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # one device, as a reader has
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    script, (long, short) = (COLABS / f"{name}.py").read_text(), SHORTER.get(name, ("", ""))
    assert long in script
    (tmp_path / f"{name}.py").write_text(script.replace(long, short) if long else script)
    assert _figures(build_notebooks.execute(tmp_path / f"{name}.py", tmp_path)) == FIGURES[name]


@pytest.fixture
def pip(monkeypatch):
    """Runs the first cell on a machine that has the given modules and programs; returns what it would have pip do."""

    def run(modules, programs=(), answer=None):
        commands = []
        report = {"install": [{"metadata": {"requires_dist": metadata.requires("aitok_jax")}}]}

        def called(command, **_):
            commands.append(command)
            return answer or SimpleNamespace(returncode=0, stdout=json.dumps(report), stderr="")

        monkeypatch.setattr(util, "find_spec", lambda name: name if name in modules else None)
        monkeypatch.setattr(shutil, "which", lambda name: name if name in programs else None)
        monkeypatch.setattr(subprocess, "run", called)
        runpy.run_path(str(build_notebooks.INSTALL))
        assert all(command[:4] == [sys.executable, "-m", "pip", "install"] for command in commands)
        return [[word for word in command[4:] if word != "-q"] for command in commands]

    return run


def test_the_first_code_cell_installs():
    for name in FIGURES:
        cells = nbformat.read(COLABS / f"{name}.ipynb", as_version=4).cells
        first = next(cell for cell in cells if cell.cell_type == "code")
        assert first.source == build_notebooks.INSTALL.read_text().rstrip()
        assert first.outputs == []


def test_nothing_is_installed_where_the_package_is(pip):
    assert pip({"aitok_jax", "tensorflow"}, {"nvidia-smi"}) == []


def _names(requirements):
    return {"".join(c if c not in ">=<!~;" else " " for c in each).split()[0] for each in requirements}


@pytest.mark.parametrize(
    ("modules", "programs", "extra"),
    [
        (set(), set(), {"jax", "tensorflow-cpu"}),
        ({"tensorflow"}, set(), {"jax"}),
        ({"tensorflow"}, {"nvidia-smi"}, {"jax", "jax[cuda12]"}),
        ({"tensorflow", "jax_cuda13_plugin"}, {"nvidia-smi"}, {"jax", "jax[cuda13]"}),
        ({"tensorflow", "jax_cuda13_plugin"}, set(), {"jax"}),
    ],
)
def test_what_is_installed(pip, modules, programs, extra):
    asked, needed, package = pip(modules, programs)
    assert asked == ["--dry-run", "--no-deps", "--report=-", ".."]
    assert package == ["--no-deps", ".."]
    names = _names(needed)
    assert {name for name in names if name.startswith(("jax", "tensorflow"))} == {*extra, "tensorflow-datasets"}
    assert {"flax", "etils[epath]", "pycocotools"} <= names
    assert not names & {"pytest", "gcsfs", "jupytext", "jax[tpu]"}


def test_a_source_that_is_none_is_one_sentence(pip):
    with pytest.raises(SystemExit, match=r"SOURCE='\.\.'; give the folder of its checkout, .*:\nno setup\.py"):
        pip(set(), answer=SimpleNamespace(returncode=1, stdout="", stderr="no setup.py"))
