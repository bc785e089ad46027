"""An image-classification pipeline that reports the exit of each image."""

from typing import Any

from transformers import ImageClassificationPipeline


class EarlyExitPipeline(ImageClassificationPipeline):
    """The stock pipeline, with an ``exit_index`` next to every label and score.

    Use it as ``pipeline("image-classification", model=folder, pipeline_class=EarlyExitPipeline)`` with a checkpoint
    whose ``early_exit`` is enabled. Without early exit, ``exit_index`` is the final exit.
    """

    def postprocess(self, model_outputs: dict[str, Any], **kwargs) -> list[dict[str, Any]]:
        """Return label, score and exit of the best classes."""
        final = self.model.num_exits - 1
        exit_index = int(model_outputs["exit_index"]) if "exit_index" in model_outputs else final
        return [prediction | {"exit_index": exit_index} for prediction in super().postprocess(model_outputs, **kwargs)]
