"""An image-classification pipeline that says where each image left."""

from typing import Any

from transformers import ImageClassificationPipeline


class EarlyExitPipeline(ImageClassificationPipeline):
    """The stock pipeline, with ``exit_index`` beside every label and score.

    Use it as ``pipeline("image-classification", model=folder, pipeline_class=EarlyExitPipeline)`` with a checkpoint
    that has ``early_exit`` on. Where all exits answered, ``exit_index`` is the deepest.
    """

    def postprocess(self, model_outputs: dict[str, Any], **kwargs) -> list[dict[str, Any]]:
        """Return label, score and exit of the best classes."""
        deepest = self.model.num_exits - 1
        exit_index = int(model_outputs["exit_index"]) if "exit_index" in model_outputs else deepest
        return [answer | {"exit_index": exit_index} for answer in super().postprocess(model_outputs, **kwargs)]
