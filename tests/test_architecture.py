"""Imports point one way: fleet ← clients and strategies ← simulations."""

import ast
import copy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fleet", "clients", "strategies", "simulations")
MAY_IMPORT = {
    "fleet": {"fleet"},
    "clients": {"fleet", "clients"},
    "strategies": {"fleet", "strategies"},
    "simulations": set(PACKAGES),
}
MODULES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text())
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imported(tree):
    """Top-level name of every absolute import, wherever in the module it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


class _WithoutFunctions(ast.NodeTransformer):
    def visit_FunctionDef(self, node):
        return None

    visit_AsyncFunctionDef = visit_FunctionDef


def without_functions(tree):
    """The part of a module that runs as it is imported."""
    return _WithoutFunctions().visit(copy.deepcopy(tree))


def test_there_is_something_to_look_at():
    assert {Path(module).parts[0] for module in MODULES} == set(PACKAGES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    tree = MODULES[module]
    if module.startswith("fleet/cli/"):  # commands reach for what they run; the library stays free
        tree = without_functions(tree)
    ours = set(imported(tree)) & set(PACKAGES)
    assert ours <= MAY_IMPORT[Path(module).parts[0]]


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("fleet/")])
def test_one_module_of_the_library_knows_flower(module):
    tree = MODULES[module]
    if module.startswith("fleet/deploy/"):  # Flower's processes; what starts them does without
        tree = without_functions(tree)
    if module != "fleet/message.py":
        assert "flwr" not in set(imported(tree))


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("fleet/deploy/")])
def test_what_keeps_a_device_connected_does_without_pytorch(module):
    assert not {"torch", "torchvision", "timm"} & set(imported(MODULES[module]))


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module):
    assert ast.get_docstring(MODULES[module])


def test_no_module_imports_by_a_relative_path():
    relative = {
        module
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    }
    assert not relative
