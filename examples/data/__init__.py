"""Image datasets for the examples: options, loading, decoding, transforms."""

from .arguments import DataArguments, SplitArguments, describe_data
from .bad_images import leave_out_bad_images
from .images import LabelledImages, as_rgb, labelled_images, read_image
from .loading import choose_splits, load_images
from .transforms import mixing_transform, training_transform

__all__ = [
    "DataArguments",
    "LabelledImages",
    "SplitArguments",
    "as_rgb",
    "choose_splits",
    "describe_data",
    "labelled_images",
    "leave_out_bad_images",
    "load_images",
    "mixing_transform",
    "read_image",
    "training_transform",
]
