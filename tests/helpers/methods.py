"""The methods of the package."""

from pathlib import Path

from hf_selfkd import list_methods, methods

# Files of the package, and not list_methods(): tests and notebooks define methods of their own.
FOLDER = Path(methods.__file__).parent
METHODS = sorted(path.stem for path in FOLDER.glob("[!_]*.py") if path.stem in list_methods())
