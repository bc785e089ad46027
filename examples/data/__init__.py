"""Image datasets for the examples: options, loading, decoding, transforms."""

from .arguments import DataArguments, EvaluationArguments, SplitArguments, describe_data
from .bad_images import leave_out_bad_images
from .images import LabelledImages, as_rgb, labelled_images, read_image
from .loading import choose_splits, has_photos, limit_samples, load_images
from .transforms import mixing_transform, training_transform

__all__ = [
    "DataArguments",
    "EvaluationArguments",
    "LabelledImages",
    "SplitArguments",
    "as_rgb",
    "choose_splits",
    "describe_data",
    "has_photos",
    "labelled_images",
    "leave_out_bad_images",
    "limit_samples",
    "load_images",
    "mixing_transform",
    "read_image",
    "training_transform",
]
