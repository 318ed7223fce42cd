"""The notebooks in colabs/: each is the executed pair of its script, and runs from top to bottom."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

COLABS = Path(__file__).parents[1] / "colabs"
FIGURES = {"predict": 4, "tokenizers": 4, "train_tiny": 2}
names = pytest.mark.parametrize("name", FIGURES)


def _figures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    return sum("image/png" in output.get("data", {}) for output in outputs)


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
    notebook = jupytext.read(COLABS / f"{name}.py")
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert _figures(notebook) == FIGURES[name]
