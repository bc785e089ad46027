"""Which module may import which: checkpoints carry models/, and imports run one way."""

import ast

import pytest
from transformers.dynamic_module_utils import get_relative_imports

from tests.helpers.layering import MODELS, PACKAGE, imports, shipped_modules

# All that loading with trust_remote_code may require: the last two come with transformers.
SHIPPED = {"torch", "timm", "transformers", "huggingface_hub", "safetensors"}
# What the extras bring.
EXTRAS = {"matplotlib", "onnx", "onnxruntime", "onnxscript", "scipy", "sklearn"}
# Modules about one of them, which are themselves imported in functions only.
OF_EXTRAS = {"deploy.onnx_early_exit"}
# The parts of this package that a folder or module may import, besides itself. Only the package imports training.
ALLOWED = {
    "models": (),
    "functional": ("models.loss", "models.multi_label"),
    "methods": (
        "functional",
        *("models.did_you_mean", "models.multi_label", "models.outputs", "models.pyramid", "models.stages"),
    ),
    "calibration": ("models",),
    "evaluation": ("models", "calibration"),
    "deploy": ("models", "calibration", "_version"),
    "tasks": ("evaluation", "functional", "models"),
    "model_card": ("models", "methods", "evaluation", "tasks", "_version"),
    "training": ("models", "functional", "methods", "calibration", "evaluation", "tasks", "model_card"),
    "_version": (),
}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    allowed = (room(path), *ALLOWED[room(path)])
    wrong = [name for name in imports(path)[0] if not any(f"{name}.".startswith(f"{part}.") for part in allowed)]
    assert wrong == []


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.py")), ids=lambda path: path.stem)
def test_transformers_finds_the_modules_that_a_checkpoint_carries(path):
    """It reads imports by a regular expression, also in docstrings, and ships no other form than these."""
    own, packages = imports(path)
    assert packages <= SHIPPED
    assert own == {f"models.{name}" for name in get_relative_imports(path)}
    assert all((PACKAGE / f"{name.replace('.', '/')}.py").is_file() for name in own)


def test_every_module_of_the_models_ships():
    assert shipped_modules() == {path.stem for path in MODELS.glob("[!_]*.py")}


def test_evaluate_is_imported_only_when_its_metric_is_asked_for():
    importers = [path for path in FILES if "evaluate" in imports(path)[1]]
    assert [path.stem for path in importers] == ["hf_evaluate"]
    assert not any("evaluation.hf_evaluate" in imports(path)[0] for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_packages_of_extras_are_imported_in_functions_only(path):
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {getattr(node, "module", None) or node.names[0].name for node in nodes}
    packages = {name.split(".")[0] for name in names} & EXTRAS
    assert bool(packages) == (module in OF_EXTRAS)
    assert not names & {name.split(".")[-1] for name in OF_EXTRAS}


def test_arithmetic_knows_torch_only():
    for name in ("functional.py", "models/loss.py", "models/multi_label.py"):
        assert imports(PACKAGE / name)[1] == {"torch"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "methods").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_methods_need_no_more_than_models(path):
    assert imports(path)[1] <= SHIPPED
