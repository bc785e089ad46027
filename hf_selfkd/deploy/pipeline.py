"""An image-classification pipeline that reports the exit of each image."""

from typing import Any

from torch import Tensor
from transformers import ImageClassificationPipeline

from ..models.exit_policy import ExitPolicy


class EarlyExitPipeline(ImageClassificationPipeline):
    """The stock pipeline, with an ``exit_index`` next to every label and score.

    Use it as ``pipeline("image-classification", model=folder, pipeline_class=EarlyExitPipeline)`` with a checkpoint
    whose ``early_exit`` is enabled. Without early exit, ``exit_index`` is the final exit.

    Two more arguments, of the pipeline or of a single call, make images exit early whether ``early_exit`` is enabled
    or not: ``policy``, an :class:`ExitPolicy` in the place of the checkpoint's, and ``target_cost``, which moves along
    the frontier of the policy, see :meth:`ExitPolicy.at`.
    """

    # Documented for subclasses of Pipeline, as is _forward: splits arguments into those of preprocessing, the forward
    # pass and postprocessing.
    def _sanitize_parameters(
        self, policy: ExitPolicy | None = None, target_cost: float | None = None, **kwargs
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        own = {"policy": policy, "target_cost": target_cost}
        return preprocess, forward | {name: value for name, value in own.items() if value is not None}, postprocess

    def _forward(
        self, model_inputs: dict[str, Tensor], policy: ExitPolicy | None = None, target_cost: float | None = None
    ) -> Any:
        if policy is None and target_cost is None:
            return super()._forward(model_inputs)
        return self.model.early_exit(**model_inputs, policy=policy, target_cost=target_cost)

    def postprocess(self, model_outputs: dict[str, Any], **kwargs) -> list[dict[str, Any]]:
        """Return label, score and exit of the best classes."""
        final = self.model.num_exits - 1
        exit_index = int(model_outputs["exit_index"]) if "exit_index" in model_outputs else final
        return [prediction | {"exit_index": exit_index} for prediction in super().postprocess(model_outputs, **kwargs)]
