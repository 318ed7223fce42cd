"""The program: what it imports, and where it keeps compiled code."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from aitok_jax import main
from aitok_jax.training import run_dir

ROOT = Path(__file__).parents[1]


def test_importing_the_loop_does_not_import_tensorflow():
    code = "import sys, aitok_jax.main; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(("backend", "given", "used"), [("gpu", None, "home"), ("cpu", None, None), ("gpu", "a", "a")])
def test_compiled_programs_are_kept_where_that_is_safe(monkeypatch, tmp_path, backend, given, used):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", given)
        main.use_compilation_cache()
        expected = str(tmp_path / ".cache" / "aitok_jax") if used == "home" else used
        assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_mistake_is_one_line(tmp_path):
    data = ["--config.data.root=/nowhere", "--config.tokenizer=x"]
    command = [sys.executable, "-m", "aitok_jax.main", "--config=configs/nyu.py", f"--workdir={tmp_path}", *data]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: /nowhere" in done.stderr.splitlines()[-1]


def test_all_hosts_know_what_was_evaluated(tmp_path, monkeypatch):
    text = '{"step": 4, "loss": 1.0}\n{"step": 4, "a/error": 1.0}\n{"step": 6, "a/error": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    folder = run_dir.RunDir(tmp_path)
    with folder.logging(5, 1):
        assert [folder.evaluated(step) for step in (3, 4, 6)] == [False, True, False]
    assert (tmp_path / "metrics.jsonl").read_text() == text
