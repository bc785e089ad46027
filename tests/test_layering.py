"""Which module may import which: a checkpoint carries the flat ones, and methods never meet the model."""

import ast
from pathlib import Path

import pytest

import hf_selfkd

PACKAGE = Path(hf_selfkd.__file__).parent
# All that a loader of trust_remote_code can be asked for: the last two come with transformers.
SHIPPED = {"torch", "timm", "transformers", "huggingface_hub", "safetensors"}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Return the sibling modules and the packages outside the standard library that a file imports."""
    siblings, packages = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            siblings.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.ImportFrom):
            packages.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
    return siblings, packages - set(__import__("sys").stdlib_module_names)


def shipped_modules() -> set[str]:
    """Return the modules that a checkpoint carries: the models and what they import, directly or not."""
    found, pending = set(), ["modeling", "segmentation", "configuration"]
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending += [sibling.lstrip(".") for sibling in imports(PACKAGE / f"{name}.py")[0]]
    return found


@pytest.mark.parametrize("name", sorted(shipped_modules()))
def test_what_a_checkpoint_carries_is_flat_and_self_contained(name):
    siblings, packages = imports(PACKAGE / f"{name}.py")
    assert all(sibling.count(".") == 1 and sibling != "." for sibling in siblings)
    assert packages <= SHIPPED


def test_evaluate_is_imported_only_when_its_metric_is_asked_for():
    importers = {path.stem for path in PACKAGE.glob("*.py") if "evaluate" in imports(path)[1]}
    assert importers == {"multi_exit_accuracy"}
    assert not any(
        "multi_exit_accuracy" in sibling for path in PACKAGE.glob("[!_]*.py") for sibling in imports(path)[0]
    )


def test_arithmetic_knows_torch_only():
    assert imports(PACKAGE / "functional.py") == (set(), {"torch"})


@pytest.mark.parametrize("path", sorted((PACKAGE / "methods").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_methods_never_import_the_model(path):
    siblings, packages = imports(path)
    assert packages <= SHIPPED
    assert not siblings & {"..modeling", "..segmentation", "..trainer", "..backbone", "..configuration"}


@pytest.mark.parametrize("name", sorted(shipped_modules()))
def test_the_model_never_imports_methods(name):
    assert not any(sibling.startswith((".methods", ".trainer")) for sibling in imports(PACKAGE / f"{name}.py")[0])
