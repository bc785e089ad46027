"""Deployment: pipelines, and export to other runtimes."""

from .export_exit import StaticExit, export_exit
from .pipeline import EarlyExitPipeline

__all__ = ["EarlyExitPipeline", "StaticExit", "export_exit"]
