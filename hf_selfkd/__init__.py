"""Turn any timm backbone into a multi-exit network, train it with self-distillation, and exit early at inference.

Build a model with ``MultiExitForImageClassification.from_backbone`` or
``MultiExitForSemanticSegmentation.from_backbone``, train it with ``SelfDistillationTrainer`` and one of the methods
that ``list_methods`` names, find an exit policy with ``calibrate``, and exit early with ``model.early_exit`` or
``EarlyExitPipeline``. ``export_exit`` writes a single exit as a static model.

Importing the package registers the models with transformers: ``AutoModelForImageClassification`` and ``pipeline`` then
load checkpoints without ``trust_remote_code``.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForSemanticSegmentation
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from ._version import __version__ as __version__
from .calibration import calibrate
from .deploy import EarlyExitPipeline, export_early_exit, export_exit, export_exits
from .evaluation import exit_costs
from .methods import Method, get_method, list_methods
from .models.configuration import MultiExitConfig
from .models.exit_policy import ExitPolicy
from .models.modeling_classification import MultiExitForImageClassification, MultiExitModel
from .models.modeling_segmentation import MultiExitForSemanticSegmentation
from .models.outputs import EarlyExitOutput, MultiExitOutput
from .training import SelfDistillationTrainer

__all__ = [
    "EarlyExitOutput",
    "EarlyExitPipeline",
    "ExitPolicy",
    "Method",
    "MultiExitAccuracy",
    "MultiExitAveragePrecision",
    "MultiExitConfig",
    "MultiExitForImageClassification",
    "MultiExitForSemanticSegmentation",
    "MultiExitModel",
    "MultiExitOutput",
    "SelfDistillationTrainer",
    "calibrate",
    "exit_costs",
    "export_early_exit",
    "export_exit",
    "export_exits",
    "get_method",
    "list_methods",
]

AutoConfig.register(MultiExitConfig.model_type, MultiExitConfig)
AutoModel.register(MultiExitConfig, MultiExitModel)
AutoModelForImageClassification.register(MultiExitConfig, MultiExitForImageClassification)
AutoModelForSemanticSegmentation.register(MultiExitConfig, MultiExitForSemanticSegmentation)
# pipeline("image-segmentation") checks only this table, which does not include registered models.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[MultiExitConfig.model_type] = MultiExitForSemanticSegmentation.__name__

# Checkpoints carry the modules that build them, for those who load with trust_remote_code and without this library.
MultiExitConfig.register_for_auto_class()
MultiExitForImageClassification.register_for_auto_class("AutoModelForImageClassification")
MultiExitModel.register_for_auto_class("AutoModel")
MultiExitForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")


def __getattr__(name: str):
    # Only these need `evaluate`, a tenth of what importing the package takes.
    if name in ("MultiExitAccuracy", "MultiExitAveragePrecision"):
        from .evaluation import hf_evaluate

        return getattr(hf_evaluate, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
