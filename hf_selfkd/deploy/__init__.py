"""Deployment: pipelines, a counter of exits, and export to other runtimes."""

from .exit_counter import ExitCounter
from .export_exit import StaticExit, export_exit
from .pipeline import EarlyExitPipeline

__all__ = ["EarlyExitPipeline", "ExitCounter", "StaticExit", "export_exit"]
