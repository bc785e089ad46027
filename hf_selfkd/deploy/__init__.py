"""Deployment: pipelines, a counter of exits, and export to other runtimes."""

from .exit_counter import ExitCounter
from .export_early_exit import export_early_exit
from .export_exit import StaticExit, export_exit, export_exits
from .pipeline import EarlyExitPipeline

__all__ = ["EarlyExitPipeline", "ExitCounter", "StaticExit", "export_early_exit", "export_exit", "export_exits"]
