"""Training: the trainer, its callbacks, checkpoints and data. Nothing here is saved with a model."""

from .checkpoints import find_last_checkpoint
from .progress import ProgressTable
from .seeded_data import SeededDataset
from .streaming import SeededStream
from .trainer import SelfDistillationTrainer

__all__ = ["ProgressTable", "SeededDataset", "SeededStream", "SelfDistillationTrainer", "find_last_checkpoint"]
