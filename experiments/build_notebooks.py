"""Runs the scripts of colabs/ as notebooks and writes NAME.ipynb with its figures beside each NAME.py.

After its title each notebook has the cell that installs the package, `notebook_install.py`.

pip install -e ".[notebooks]" && python experiments/build_notebooks.py [NAME...]
"""

import argparse
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

COLABS = Path(__file__).parents[1] / "colabs"
INSTALL = Path(__file__).with_name("notebook_install.py")


def read(script: Path) -> nbformat.NotebookNode:
    """The notebook of a jupytext script, not executed."""
    notebook = jupytext.read(script)
    notebook.cells.insert(1, nbformat.v4.new_code_cell(INSTALL.read_text().rstrip()))
    return notebook


def execute(script: Path, folder: str | Path) -> nbformat.NotebookNode:
    """The executed notebook of a script; files it writes go to `folder`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed, or took longer than 20 minutes.
    """
    notebook = read(script)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=1200, coalesce_streams=True, resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which change with every run
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of the scripts; all where none is given")
    for name in parser.parse_args().names or sorted(path.stem for path in COLABS.glob("*.py")):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(execute(COLABS / f"{name}.py", folder), COLABS / f"{name}.ipynb")
        print(COLABS / f"{name}.ipynb")


if __name__ == "__main__":
    main()
