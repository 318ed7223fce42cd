"""The program: what it imports, and where it keeps compiled code."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from aitok_jax import main

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
