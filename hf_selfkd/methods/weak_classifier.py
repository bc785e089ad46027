"""A linear classifier on an inner stage, used only in training."""

from torch import Tensor, nn

from ..models.outputs import MultiExitOutput
from ..models.stages import choose_stages


class WeakClassifier(nn.Module):
    """Global average pooling and one linear layer on the feature map of a stage.

    Args:
        stage: Index of the stage.
        channels: Its channels.
        num_labels: Number of classes.
    """

    def __init__(self, stage: int, channels: int, num_labels: int):
        super().__init__()
        self.stage = stage
        self.classifier = nn.Linear(channels, num_labels)

    def forward(self, pixel_values: Tensor, output: MultiExitOutput) -> dict[str, Tensor]:
        """Return ``weak_logits`` ``(batch, classes)``."""
        return {"weak_logits": self.classifier(output.exit_maps[self.stage].mean(dim=(2, 3)))}


def build_weak_classifier(model: nn.Module) -> WeakClassifier:
    """Build it on the last default exit's stage: the last before the lowest resolution, or after three quarters.

    Raises:
        ValueError: If the model has no stage before its last one.
    """
    stages = model.anatomy.stages
    inner = choose_stages(stages, include_last=False)
    if not inner:
        raise ValueError(
            f"The weak classifier reads a stage before the last, but {model.config.backbone} has none. Choose "
            "a method that needs no inner stage."
        )
    return WeakClassifier(inner[-1], stages[inner[-1]].channels, model.config.num_labels)
