"""Software and hardware that the numbers of a run depend on."""

import platform
import re
import subprocess
from pathlib import Path

import timm
import torch
import transformers

from .._version import __version__


def versions() -> dict[str, str]:
    """Return the installed versions of this library, transformers, timm, torch and Python."""
    return {
        "hf_selfkd": __version__,
        "transformers": transformers.__version__,
        "timm": timm.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }


def current_commit() -> str | None:
    """Return the git commit of the working directory, with the suffix ``-dirty`` if there are uncommitted changes.

    ``None`` outside of a git repository.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None


def device_name(device: torch.device) -> str:
    """Return the name of an accelerator, or that of the processor with the number of threads that torch uses."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    threads = torch.get_num_threads()
    name = names[0].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"
