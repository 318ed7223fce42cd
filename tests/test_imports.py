"""Data flows one way: no circles, a room imports only from rooms below its own, TensorFlow comes late and to few.

And what keeps the package easy to find one's way in: sizes and names of its files, and who speaks of a modality.
"""

import ast
import collections
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (  # of rooms, from the top; those of one line do not import each other
    ("configs", "experiments"),
    ("main",),
    ("export", "tokenizers"),
    ("predict",),
    ("convert",),
    ("training",),
    ("evaluators",),
    ("visualize",),
    ("data",),
    ("tasks",),
    ("modalities",),
    ("models",),
    ("scenes", "parallel"),
    ("command_line",),
    ("image", "config"),
    ("paths",),
)
LAYER = {name: i for i, layer in enumerate(LAYERS) for name in layer}
ABOVE = {("experiments", "configs")}  # on one line, and yet one imports the other
APART = {  # besides the layers: who must not know whom
    "main": {"export", "tokenizers", "predict", "convert", "evaluators", "visualize", "data", "tasks", "models"},
    "export": {"convert", "training", "evaluators", "visualize", "data", "parallel"},
    "tokenizers": {"predict", "evaluators", "visualize", "data", "parallel"},
    "predict": {"convert", "evaluators", "data", "parallel"},
    "convert": {"evaluators", "visualize", "data", "parallel"},
    "training": {"visualize", "models", "modalities"},
    "evaluators": {"models"},
    "visualize": {"data", "tasks", "models"},
    "data": {"tasks", "models", "parallel"},  # of tasks, only its modalities
    "tasks": {"scenes", "parallel"},
    "modalities": {"scenes", "parallel", "config"},
    "models": {"scenes", "parallel", "image", "config"},
    "scenes": {"image", "config"},
    "parallel": {"image", "config"},
}
CHECKPOINTS = {"predict", "convert", "tokenizers"}  # know of training only how runs are read and written
TENSORFLOW = {"tensorflow", "tensorflow_datasets", "tensorflow_io", "clu"}  # clu's metric writers import TensorFlow
MAY_IMPORT_TENSORFLOW = {"data", "evaluators", "training"}
MAY_IMPORT_IT_AT_ONCE = "aitok_jax.data.preparation."  # its classes are TFDS's; only `data.prepare` imports them
MAX_LINES, MAX_AT_THE_TOP = 400, 8
SHARED_NAMES = {"__init__.py", "__main__.py", "maps.py", "objects.py"}  # tasks and evaluators of maps and objects
KNOW_DEPTH, KNOW_NORMALS = 18, 8  # files that may mention them
KNOW_NO_MODALITY = ("predict/predictor.py", "export.py", "evaluators/*.py")

FILES = sorted(p for folder in ("aitok_jax", "configs", "experiments") for p in (ROOT / folder).rglob("*.py"))
PACKAGE = sorted((ROOT / "aitok_jax").rglob("*.py"))


def module(file: Path) -> str:
    """Its dotted name; that of a folder for __init__.py."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(file): file for file in FILES}


def room(dotted: str) -> str:
    """The first name below aitok_jax ('training', 'image', ...), 'modalities', or the top-level folder; '' for none."""
    names = dotted.split(".")
    if names[:3] == ["aitok_jax", "tasks", "modalities"]:
        return "modalities"
    if names[0] != "aitok_jax":
        return names[0]
    return names[1] if len(names) > 1 else ""


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
    """What a module of room `name` must not import, of what its source imports."""
    wrong = []
    for dotted, line in imported(ast.parse(source)):
        target = room(dotted)
        if target == name or target not in LAYER or not name:
            continue
        level = LAYER[target] <= LAYER[name] and (name, target) not in ABOVE
        more = name in CHECKPOINTS and target == "training" and "checkpoint" not in dotted.split(".")
        if level or more or target in APART.get(name, ()):
            wrong.append(f"line {line}: {name} imports {dotted}")
    return wrong


def at_module_level(source: str) -> list[tuple[str, int]]:
    """Imports that run when the module is imported: those outside functions."""

    class Outside(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

    return imported(Outside().visit(ast.parse(source)))


def tensorflow_imports(dotted: str, source: str) -> list[str]:
    if f"{dotted}.".startswith(MAY_IMPORT_IT_AT_ONCE):
        return []
    late = room(dotted) in MAY_IMPORT_TENSORFLOW
    names = at_module_level(source) if late else imported(ast.parse(source))
    return [f"line {line}: {dotted} imports {name}" for name, line in names if name.split(".")[0] in TENSORFLOW]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file):
    name = room(module(file))
    assert not name or name in LAYER, f"give {name} a layer in LAYERS"
    assert not back_edges(name, file.read_text())
    assert not tensorflow_imports(module(file), file.read_text())


def circle(sources: dict[str, str]) -> list[str]:
    """The modules of a circle of imports, wherever in the files they are; [] where there is none."""
    graph = {}
    for dotted, source in sources.items():
        names = [name for name, _ in imported(ast.parse(source))]
        graph[dotted] = {name if name in sources else name.rpartition(".")[0] for name in names} & sources.keys()
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_there_are_no_circles():
    assert not circle({name: file.read_text() for name, file in MODULES.items()})


def test_a_circle_is_found():
    sources = {"aitok_jax.a": "from aitok_jax import b", "aitok_jax.b": "def f():\n    from aitok_jax.a import x"}
    assert set(circle(sources)) == {"aitok_jax.a", "aitok_jax.b"}
    assert not circle(sources | {"aitok_jax.b": "import jax"})


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("models", "from aitok_jax.tasks.base import Task"),
        ("config", "import aitok_jax.models.vqvae"),
        ("data", "def f():\n    from aitok_jax import evaluators"),
        ("data", "from aitok_jax.tasks.maps import MapPart"),
        ("modalities", "from aitok_jax.tasks import base"),
        ("tasks", "from aitok_jax import image, training"),
        ("training", "import configs.nyu"),
        ("export", "from aitok_jax.tokenizers import DepthTokenizer"),
        ("predict", "from aitok_jax.training import loop"),
    ],
)
def test_a_back_edge_is_found(name, source):
    assert back_edges(name, source)


def test_tensorflow_is_found():
    late = "def f():\n    import tensorflow as tf"
    assert not tensorflow_imports("aitok_jax.data.pipeline", late)
    assert tensorflow_imports("aitok_jax.models.vqvae", late)
    assert tensorflow_imports("aitok_jax.data.pipeline", "if True:\n    from tensorflow import data")
    assert tensorflow_imports("aitok_jax.data.pipeline", "class A:\n    import tensorflow")


def test_the_package_does_not_load_tensorflow():
    code = (
        "import sys, aitok_jax, aitok_jax.predict.__main__, aitok_jax.export, aitok_jax.training.loop\n"
        "import aitok_jax.tokenizers, aitok_jax.data.prepare, aitok_jax.evaluators, aitok_jax.convert.__main__\n"
        "slow = ('tensorflow', 'tensorflow_datasets', 'torch')\n"
        "sys.exit(' '.join(name for name in slow if name in sys.modules) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr


def named(files, word: str) -> list[str]:
    """Those that mention a word, as `grep -w` has it."""
    return [str(file.relative_to(ROOT)) for file in files if re.search(rf"\b{word}\b", file.read_text())]


def test_files_are_short_and_few_at_the_top():
    files = [*FILES, *(ROOT / "tests").rglob("*.py")]
    lines = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert not {name: count for name, count in lines.items() if count > MAX_LINES}
    assert len(list((ROOT / "aitok_jax").glob("*.py"))) <= MAX_AT_THE_TOP


def test_no_two_files_have_one_name():
    counts = collections.Counter(file.name for file in PACKAGE)
    assert not {name for name, count in counts.items() if count > 1} - SHARED_NAMES


def test_configurations_have_their_keys():
    """Whoever asks a configuration for a key that may be missing hides a wrong one; one place fills them in."""
    assert {str(file.relative_to(ROOT)) for file in PACKAGE if "config.get(" in file.read_text()} <= {
        "aitok_jax/config.py"
    }
    assert (ROOT / "aitok_jax" / "config.py").read_text().count("config.get(") <= 1


def test_few_files_speak_of_a_modality():
    depth, normals = named(PACKAGE, "depth"), named([*PACKAGE, *(ROOT / "configs").glob("*.py")], "normals")
    assert len(depth) <= KNOW_DEPTH, depth
    assert len(normals) <= KNOW_NORMALS, normals


def test_prediction_evaluation_and_export_know_no_modality():
    files = [file for pattern in KNOW_NO_MODALITY for file in (ROOT / "aitok_jax").glob(pattern)]
    assert len(files) > 6
    assert not named(files, "depth") + named(files, "normals")
