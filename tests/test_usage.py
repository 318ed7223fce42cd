"""`--help` of the commands with a configuration, and configurations that come with the package."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aitok_jax.command_line import overrides, usage

ROOT = Path(__file__).parents[1]
FAMILIES = {path.name for path in (ROOT / "configs").glob("*.py")} - {"__init__.py", "common.py"}


def ran(words, folder):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder, check=False)


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.parametrize(("module", "word"), [("aitok_jax.main", "--help"), ("aitok_jax.convert", "-h")])
def test_help_is_no_error_and_lists_the_configurations(module, word, tmp_path):
    done = ran(["-m", module, word], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("    Arguments") == len(FAMILIES)
    assert set(re.findall(r"^  configs/(.+?): .{20}", done.stdout, re.MULTILINE)) == FAMILIES
    assert "--config: Configuration" in done.stdout
    example = re.search(rf"For example.*\n\n    python (-m {module} .*)\n", done.stdout)[1].split()
    if module == "aitok_jax.main":  # tests/test_end_to_end.py runs it
        assert "stages" in overrides.load(example[2].removeprefix("--config="))
    else:
        assert ran(example, tmp_path).returncode == 0
        assert (tmp_path / example[-1]).stat().st_size > 1e6


@pytest.mark.parametrize("installed", [False, True])
def test_configurations_come_along(installed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if installed:
        shutil.copytree(ROOT / "configs", tmp_path / "package" / "configs")
        shutil.copy(ROOT / "configs" / "nyu.py", tmp_path / "package")  # of another package there
        monkeypatch.setattr(usage, "_PLACES", (tmp_path / "package",))
    assert overrides.load("configs/nyu.py:parallel").name == "depth"
    with pytest.raises(FileNotFoundError, match=r"configs/nothing.py: No such file"):
        overrides.load("configs/nothing.py")
    with pytest.raises(FileNotFoundError):
        overrides.load("nyu.py")
    Path("configs").mkdir()
    Path("configs/nyu.py").write_text("def get_config(arg=None): return {'name': 'mine'}")
    assert overrides.load("configs/nyu.py").name == "mine"
