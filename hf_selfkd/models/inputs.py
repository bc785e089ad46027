"""Images as a network takes them: its device, its floating point type, its number of channels."""

import torch
from torch import Tensor, nn

# Weights of red, green and blue in a grey image (ITU-R BT.601), as in Pillow's conversion to mode L. They sum to 1, so
# that normalised images may be converted too.
LUMA = (0.299, 0.587, 0.114)


def prepare_images(network: nn.Module, pixel_values: Tensor, channels: int) -> Tensor:
    """Move images to the device of a network, in its type; convert RGB for a network of grey images.

    Image processors and pipelines always make images of three channels in float32.

    Args:
        network: The network.
        pixel_values: ``(batch, channels, height, width)``, normalised.
        channels: Channels that the network takes.

    Raises:
        ValueError: If the images are integers, which are not normalised, or have another number of channels.
    """
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values must be normalised images in a floating point type, but got {pixel_values.dtype}. Prepare "
            "them with the checkpoint's image processor; SelfDistillationTrainer normalises uint8 images itself."
        )
    if pixel_values.dim() != 4 or (pixel_values.shape[1] != channels and (pixel_values.shape[1], channels) != (3, 1)):
        raise ValueError(
            f"The network takes images (batch, {channels}, height, width), but got {tuple(pixel_values.shape)}. "
            "backbone_kwargs={'in_chans': ...} builds it for another number of channels; image processors and "
            "pipelines make three, which networks of one or three channels take."
        )
    if pixel_values.shape[1] != channels:
        weights = torch.tensor(LUMA, dtype=pixel_values.dtype, device=pixel_values.device)
        pixel_values = (pixel_values * weights.view(3, 1, 1)).sum(dim=1, keepdim=True)
    like = next((parameter for parameter in network.parameters() if parameter.is_floating_point()), None)
    if like is None or (pixel_values.dtype == like.dtype and pixel_values.device == like.device):
        return pixel_values  # the replicas of torch's DataParallel have no parameters
    return pixel_values.to(like.device, like.dtype)


def size_error(backbone: str, size: tuple[int, ...], error: AssertionError) -> ValueError:
    """Return the error for images of a size that timm refuses by an assertion.

    Args:
        backbone: Name of the network.
        size: Height and width of the images.
        error: timm's.
    """
    height, width = size
    return ValueError(
        f"{backbone} does not take images of {height}x{width} pixels: {error} Resize them to the size that it was "
        f"built for, or build it for theirs with backbone_kwargs={{'img_size': {[height, width]}}} or, where it has "
        "the option, {'dynamic_img_size': True} or {'strict_img_size': False}."
    )
