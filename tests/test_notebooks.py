"""The notebooks in colabs/: each is the executed pair of its script, and runs from top to bottom."""

import build_notebooks
import jupytext
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
    script = jupytext.read(COLABS / f"{name}.py")
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
