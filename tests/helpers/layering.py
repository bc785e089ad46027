"""Which module imports which, read from the source."""

import ast
import sys
from pathlib import Path

import hf_selfkd

PACKAGE = Path(hf_selfkd.__file__).parent
MODELS = PACKAGE / "models"


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Return the modules of this package and the packages outside the standard library that a file imports.

    Modules are named from the package, as in ``models.loss``; ``from . import name`` is named ``models.``.
    """
    own, packages = set(), set()
    folders = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            own.add(".".join([*folders[: len(folders) - node.level + 1], node.module or ""]))
        elif isinstance(node, ast.ImportFrom):
            packages.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
    return own, packages - set(sys.stdlib_module_names)


def shipped_modules() -> set[str]:
    """Return the modules that a checkpoint carries: the models and what they import, directly or not."""
    found, pending = set(), ["modeling_classification", "modeling_segmentation", "configuration"]
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending += [module.removeprefix("models.") for module in imports(MODELS / f"{name}.py")[0]]
    return found
