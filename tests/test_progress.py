"""Progress where there is a terminal, and where there is none."""

import io
import re
import time
from pathlib import Path

import pytest

from aitok_jax.command_line import progress

PACKAGE = Path(progress.__file__).parents[1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "seconds", "drawn"), [(io.StringIO, 30, 2), (io.StringIO, 0.1, 4), (Terminal, 30, 4)]
)
def test_a_line_now_and_then_without_a_terminal(stream, seconds, drawn, monkeypatch):
    shown = stream()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setattr(progress, "SECONDS", seconds)
    for _ in progress.progress_bar(range(200), desc="work"):
        time.sleep(0.003)
    lines = shown.getvalue().strip().split("\r")
    assert len(lines) == drawn if drawn == 2 else len(lines) >= drawn
    assert "200/200" in lines[-1]


def test_all_bars_are_of_one_kind():
    own = {path.name for path in PACKAGE.rglob("*.py") if re.search(r"\btqdm\(", path.read_text())}
    assert own == {"progress.py"}
