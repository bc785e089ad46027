"""Self-distillation methods, one file per paper. Importing a file registers its method, and all are imported."""

from importlib import import_module
from pkgutil import iter_modules

from .base import Method
from .registry import get_method, list_methods

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["Method", "get_method", "list_methods"]
