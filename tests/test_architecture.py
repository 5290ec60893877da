"""Imports point one way: fleet ← clients and strategies ← simulations."""

import ast
import copy
from pathlib import Path

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


def of_folder(folder):
    """Modules in a folder, of which there are some."""
    found = [module for module in MODULES if module.startswith(folder)]
    assert found
    return found


def test_there_is_something_to_look_at():
    assert {Path(module).parts[0] for module in MODULES} == set(PACKAGES)


def test_imports_point_one_way():
    wrong = {}
    for module, tree in MODULES.items():
        if module.startswith("fleet/cli/"):  # commands reach for what they run, the library not
            tree = without_functions(tree)
        ours = set(imported(tree)) & set(PACKAGES)
        wrong[module] = ours - MAY_IMPORT[Path(module).parts[0]]
    assert not {module: names for module, names in wrong.items() if names}


def test_one_module_of_the_library_knows_flower():
    knows = set()
    for module in of_folder("fleet/"):
        tree = MODULES[module]
        if module.startswith("fleet/deploy/"):  # Flower's processes; what starts them does without
            tree = without_functions(tree)
        if "flwr" in set(imported(tree)):
            knows.add(module)
    assert knows == {"fleet/message.py"}


def test_what_keeps_a_device_connected_does_without_pytorch():
    libraries = {"torch", "torchvision", "timm"}
    assert not {m for m in of_folder("fleet/deploy/") if libraries & set(imported(MODULES[m]))}


def test_every_module_says_what_it_is_for():
    assert not {module for module, tree in MODULES.items() if not ast.get_docstring(tree)}


def test_no_module_imports_by_a_relative_path():
    relative = {
        module
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    }
    assert not relative
