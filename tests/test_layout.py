"""How the package is laid out: what a newcomer may rely on to find his way."""

import ast
from collections import Counter
from pathlib import Path

import pytest

import cudagraph_jax

ROOT = Path(cudagraph_jax.__path__[0])
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py")
FOLDERS = sorted({path.parent for path in ROOT.rglob("*.py")})
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}


def twice(names):
    return [name for name, count in Counter(names).items() if count > 1]


def test_every_name_is_the_name_of_one_thing():
    """No two modules have one name, and no two classes."""
    assert twice(path.name for path in MODULES) == []
    assert twice(classes()) == []


def classes():
    """The names of all classes that stand in a module."""
    nodes = (node for tree in TREES.values() for node in tree.body)
    return [node.name for node in nodes if isinstance(node, ast.ClassDef)]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_can_be_taken_in(folder):
    """At most a dozen modules, and a line that says what lives there."""
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 12
    assert ast.get_docstring(TREES[folder / "__init__.py"])


def test_a_module_is_one_noun():
    """None is so long that a second idea must be in it, and there are not too many of them."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in TREES}
    assert [path for path, length in lengths.items() if length > 600] == []
    assert len(TREES) <= 205


def test_no_base_class_exists_to_shorten_another():
    """A class of the package that is inherited from has more than one heir, or is public."""
    bases = Counter(
        base.id
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if isinstance(base, ast.Name)
    )
    lonely = {name for name, heirs in bases.items() if heirs == 1 and name in classes()}
    # A watched route is a route that costs more; errors are a tree that users catch by its nodes.
    allowed = {"Route", *vars(cudagraph_jax.errors)}
    assert lonely - allowed == set()


def test_no_private_interface_of_jax():
    """What JAX does not promise is not imported, but in the one place that says why."""
    for path, tree in TREES.items():
        if path == ROOT / "xla" / "coordinator.py":
            continue
        for node in ast.walk(tree):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.startswith("jax._src")], path
