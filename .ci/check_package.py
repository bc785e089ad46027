"""Check the package as users install it: its extras resolve, and its wheel works in an environment of its own.

The environment has the dependencies of the one that runs this, because downloading them again takes gigabytes.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
UV = Path(sys.executable).with_name("uv")
PYTHONS = ("3.10", "3.14")  # the oldest and the newest


def run(*command: str | Path, folder: str | Path = ROOT) -> None:
    """Run a command; end with its exit status if it fails."""
    print("+", *command, flush=True)
    if status := subprocess.run(command, cwd=folder).returncode:
        sys.exit(status)


def resolve(*options: str) -> None:
    """Resolve all extras without installing them."""
    run(UV, "pip", "compile", "--quiet", "--all-extras", *options, "--output-file", os.devnull, "pyproject.toml")


def install(wheel: Path, environment: Path) -> Path:
    """Install a wheel in a new environment; return its Python."""
    python = environment / "bin" / "python"
    run(UV, "venv", "--quiet", "--python", sys.executable, environment)
    run(UV, "pip", "install", "--quiet", "--no-deps", "--python", python, wheel)
    packages = next(environment.glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


def main():
    """Run all checks."""
    resolve("--python-version", PYTHONS[0], "--resolution", "lowest-direct")
    for version in PYTHONS:
        resolve("--python-version", version, "--only-binary", ":all:")
    with tempfile.TemporaryDirectory() as folder:
        run(UV, "build", "--quiet", "--out-dir", folder)  # the sdist, and from it the wheel
        python = install(next(Path(folder).glob("*.whl")), Path(folder, "venv"))
        run(python, "-m", "pip", "check")
        run(python, "-I", ROOT / ".ci" / "check_installed.py", folder=folder)


if __name__ == "__main__":
    main()
