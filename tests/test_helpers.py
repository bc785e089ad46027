"""Test modules share code in ``tests.helpers`` and fixtures in conftest.py: none imports another."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def imported_names(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = f"tests.{node.module}" if node.level else node.module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_module_imports_a_test_module(path):
    own = [name for name in imported_names(path) if name.startswith("tests.")]
    assert [name for name in own if ".test_" in name] == []
