"""The last prediction for each training image, kept from one epoch to the next."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.outputs import MultiExitOutput
from .base import Method, missing_scaffold


class Predictions(nn.Module):
    """One probability vector per training image, equal on all processes.

    It takes two bytes per image and class on the device of every process, and as much in every checkpoint: 10 MB for
    CIFAR-100, 2.6 GB for ImageNet.

    Args:
        num_classes: Number of classes.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.register_buffer("table", torch.zeros(0, num_classes, dtype=torch.float16))

    def allocate(self, num_images: int) -> None:
        """Make room for the images with indices from 0, all without a prediction."""
        self.table = self.table.new_zeros(num_images, self.table.shape[1])

    def recall(self, indices: Tensor, otherwise: Tensor) -> Tensor:
        """Return the last predictions ``(batch, classes)`` in float32.

        Args:
            indices: Indices of the images, ``(batch,)``.
            otherwise: The result for images without a prediction, ``(batch, classes)``.
        """
        found = self.table[indices].float()
        return torch.where(found.sum(dim=1, keepdim=True) > 0, found, otherwise)

    @torch.no_grad()
    def keep(self, indices: Tensor, probabilities: Tensor) -> None:
        """Keep predictions of this process and of all others, which must call this too.

        Args:
            indices: Indices of the images, ``(batch,)``, equally many on all processes.
            probabilities: ``(batch, classes)``.
        """
        indices, probabilities = _gather(indices), _gather(probabilities.to(self.table.dtype))
        # An image may come twice, from a sampler with replacement or to fill the last batch. Writing different rows to
        # one place would leave it to chance which one stays, on each process.
        first = (indices.unsqueeze(1) == indices).int().argmax(dim=1)
        self.table[indices] = probabilities[first]

    def forward(self, pixel_values: Tensor, output: MultiExitOutput) -> dict[str, nn.Module]:
        """Return this module as ``predictions``: mixed precision would copy a tensor of all of them in each step."""
        return {"predictions": self}


def predictions_of(method: Method, output: MultiExitOutput) -> Predictions:
    """Return the predictions in the scaffold of an output.

    Raises:
        ValueError: If there are none, or the images have no index.
    """
    if output.scaffold is None:
        raise missing_scaffold(method, "its predictions")
    predictions = output.scaffold["predictions"]
    if output.sample_indices is None or len(predictions.table) == 0:
        raise ValueError(
            f"{type(method).__name__} needs the index of every training image, which streams do not have. In your own "
            "loop call method.attach(model, num_images=...) and set output.sample_indices."
        )
    return predictions


def _gather(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all processes."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
