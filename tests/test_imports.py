"""Data flows one way: a module imports only from layers below its own, and TensorFlow is imported late and by few."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (  # from the top; the modules of one line may import each other
    ("configs", "experiments"),
    ("main",),
    ("train", "predict", "predict_cli", "export", "tokenizers"),
    ("prepare",),
    ("evaluators", "convert", "resize"),
    ("tasks", "data", "builders"),
    ("warm_start", "accumulate"),
    ("models", "checkpoint", "sharding", "optim", "run_dir", "visualize"),
    ("train_state", "preemption", "overview", "distributed"),
    ("losses", "metrics", "geometry", "paste", "pointcloud", "sequences", "vocab", "config_utils"),
)
LAYER = {name: i for i, layer in enumerate(LAYERS) for name in layer}
APART = {  # besides the layers: who must not know whom
    "data": {"models", "tasks", "train", "evaluators", "predict", "optim", "checkpoint"},
    "builders": {"models", "tasks", "train", "evaluators", "predict", "optim", "checkpoint"},
    "tasks": {"data"},
    "predict": {"data", "train", "evaluators"},
    "predict_cli": {"data", "train", "evaluators"},
    "export": {"data", "train", "evaluators"},
    "train": {"models", "losses"},
    "prepare": {"models", "losses", "evaluators"},
    "evaluators": {"models", "convert"},
    "convert": {"data", "evaluators"},
    "tokenizers": {"data", "train", "evaluators", "predict"},
    "models": {"checkpoint", "sharding", "optim", "run_dir", "visualize"},
}
TENSORFLOW = {"tensorflow", "tensorflow_datasets", "tensorflow_io", "clu"}  # clu's metric writers import TensorFlow
MAY_IMPORT_TENSORFLOW = {"data", "evaluators", "run_dir"}
MAY_IMPORT_IT_AT_ONCE = {"builders"}  # their classes are TFDS's; only the command that prepares data imports them


def part(file: Path) -> str:
    """The first name below aitok_jax ('tasks', 'losses', ...), 'builders', or the top-level folder."""
    place = file.relative_to(ROOT).parts
    if place[:3] == ("aitok_jax", "data", "builders"):
        return "builders"
    return Path(place[1]).stem if place[0] == "aitok_jax" else place[0]


def imported(tree: ast.AST) -> list[tuple[str, int]]:
    """(dotted name, line) of every import in the tree; for `from a import b` the name is a.b."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            names += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return names


def back_edges(name: str, source: str) -> list[str]:
    """What a module of part `name` must not import, of what its source imports."""
    wrong = []
    for dotted, line in imported(ast.parse(source)):
        package, _, rest = dotted.partition(".")
        target = rest.split(".")[0] if package == "aitok_jax" else package
        if target == name or target not in LAYER or name == "__init__":
            continue
        if LAYER[target] < LAYER[name] or target in APART.get(name, ()):
            wrong.append(f"line {line}: {name} imports {dotted}")
    return wrong


def at_module_level(source: str) -> list[tuple[str, int]]:
    """Imports that run when the module is imported: those outside functions."""

    class Outside(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

    return imported(Outside().visit(ast.parse(source)))


def tensorflow_imports(name: str, source: str) -> list[str]:
    if name in MAY_IMPORT_IT_AT_ONCE:
        return []
    names = at_module_level(source) if name in MAY_IMPORT_TENSORFLOW else imported(ast.parse(source))
    return [f"line {line}: {name} imports {dotted}" for dotted, line in names if dotted.split(".")[0] in TENSORFLOW]


FILES = sorted(p for folder in ("aitok_jax", "configs", "experiments") for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file):
    name = part(file)
    assert name == "__init__" or name in LAYER, f"give {name} a layer in LAYERS"
    assert not back_edges(name, file.read_text())
    assert not tensorflow_imports(name, file.read_text())


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("models", "from aitok_jax.tasks.base import Task"),
        ("losses", "import aitok_jax.models.vqvae"),
        ("data", "def f():\n    from aitok_jax import evaluators"),
        ("tasks", "from aitok_jax import geometry, train"),
        ("train", "import configs.nyu"),
    ],
)
def test_a_back_edge_is_found(name, source):
    assert back_edges(name, source)


def test_tensorflow_is_found():
    late = "def f():\n    import tensorflow as tf"
    assert not tensorflow_imports("data", late)
    assert tensorflow_imports("models", late)
    assert tensorflow_imports("data", "if True:\n    from tensorflow import data")
    assert tensorflow_imports("data", "class A:\n    import tensorflow")


def test_the_package_does_not_load_tensorflow():
    code = (
        "import sys, aitok_jax, aitok_jax.predict_cli, aitok_jax.export, aitok_jax.train, aitok_jax.tokenizers\n"
        "import aitok_jax.data.prepare, aitok_jax.evaluators, aitok_jax.convert.__main__\n"
        "slow = ('tensorflow', 'tensorflow_datasets', 'torch')\n"
        "sys.exit(' '.join(name for name in slow if name in sys.modules) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
