"""`--help`, and the configurations that come along."""

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

_PACKAGE = Path(__file__).parents[1]
_PLACES = (_PACKAGE / "shipped", _PACKAGE.parent)  # of the folder `configs`: as installed, and in a checkout
_ASKED = {"-h", "-?", "-help", "--help", "-helpshort", "--helpshort"}


def show_if_asked(argv: Sequence[str], described: str) -> None:
    """Ends the program with exit code 0 where `argv` asks for help, after the description, flags and configurations."""
    if not _ASKED.isdisjoint(argv):
        print(described, flags.FLAGS.main_module_help(), _configurations(), sep="\n")
        sys.exit(0)


def with_ours(file: Path) -> Path:
    """The file, or where there is none the configuration of this name that comes with the package."""
    ours = [place / file for place in _PLACES if file.parts[:1] == ("configs",) and (place / file).is_file()]
    return file if file.is_file() or not ours else ours[0]


def _configurations() -> str:
    folder = next(place / "configs" for place in (Path(), *_PLACES) if (place / "configs" / "common.py").is_file())
    texts = ["Configurations:"]
    for file in sorted(folder.glob("*.py")):
        described = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")
        if arguments := [text for text in described if text.startswith("Arguments")]:
            texts += [f"\n  configs/{file.name}: {described[0]}", *("    " + line for line in arguments[0].split("\n"))]
    return "\n".join(texts)
