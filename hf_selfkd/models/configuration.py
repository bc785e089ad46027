"""The configuration of multi-exit models: everything that rebuilds a model except its weights."""

import warnings
from typing import Any

import torch
from torch.utils._pytree import tree_leaves  # see hooks.py
from transformers import PreTrainedConfig

# Arguments that make timm read files, download weights or take memory on a device, or that this library sets itself.
REFUSED_BACKBONE_KWARGS = {
    "cache_dir",
    "checkpoint_path",
    "device",
    "dtype",
    "features_only",
    "num_classes",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_filter_fn",
    "pretrained_model_args",
    "pretrained_strict",
    "scriptable",
}

# Configurations are untrusted, so their numbers are bounded before anything is built from them: classes; widths and
# all numbers in backbone_kwargs; sides in pixels of the images that the image processor makes. Far above the needs of
# timm's own models (115,217 classes, widths of 8,192, images of 1,024 pixels).
MAX_CLASSES = 200_000
MAX_SIZE = 65_536
MAX_IMAGE_SIDE = 8_192
# Fields that transformers itself writes into a configuration or accepts in one, besides its declared ones.
_TRANSFORMERS_FIELDS = {
    "_commit_hash",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "per_layer_config",
    "quantization_config",
    "torch_dtype",
    "use_cache",
}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class MultiExitConfig(PreTrainedConfig):
    """Configuration of a multi-exit network around a timm backbone.

    Args:
        backbone: A timm architecture name, with or without a timm tag (``resnet18.a1_in1k``).
        backbone_kwargs: Passed to ``timm.create_model``. Arguments that download or read weights are rejected; use
            :meth:`MultiExitForImageClassification.from_backbone` for these.
        exits: Indices into the backbone's ``feature_info`` of the stages with an auxiliary exit, strictly increasing.
            The final exit is the backbone's own head and never listed. ``None``: in an isotropic network the stages
            after a quarter, half and three quarters of its depth, in a hierarchical one the last stage of each of the
            three resolutions before the final one. ``[]``: no auxiliary exit.
        exit_width: Width of exit features; ``None``: that of the backbone's own pre-logits.
        pyramid_width: Channels of the feature pyramid, for segmentation.
        small_input_stem: Build the stem with a 3x3 stride-1 convolution and no pooling, for 32-pixel images.
        exit_policy: A calibrated :class:`ExitPolicy` as a dictionary.
        early_exit: Whether ``forward`` in eval mode, without labels, uses the policy.
        ensemble: Whether ``logits`` in eval mode is the mean over all exits instead of those of the final exit.
        pretrained_cfg: timm's data configuration (``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``,
            ``crop_mode``), read by the image processor; ``None``: the backbone's.
        image_processor_type: Class that ``AutoImageProcessor`` builds from this configuration.
        semantic_loss_ignore_index: Label of ignored pixels in semantic segmentation.

    As in transformers, ``problem_type="multi_label_classification"`` makes every class a binary decision of its own.

    A configuration from the Hub is safe to read and to build from: it causes no download and no reading of other
    files. More than 200,000 classes, widths and numbers in ``backbone_kwargs`` above 65,536, images of more than 8,192
    pixels a side and models of more than 10 billion values are rejected before memory is allocated.

    Unknown fields are kept, as in every transformers configuration, with a warning that names them.

    Raises:
        ValueError: If a field has the wrong type or a value out of range, or names something that would be fetched.
    """

    model_type = "multi_exit"
    keys_to_ignore_at_inference = ["exit_features", "exit_maps", "stage_outputs", "scaffold"]

    backbone: str = "resnet18"
    backbone_kwargs: dict[str, Any] | None = None
    exits: list[int] | None = None
    exit_width: int | None = None
    pyramid_width: int = 64
    small_input_stem: bool = False
    exit_policy: dict[str, Any] | None = None
    early_exit: bool = False
    ensemble: bool = False
    pretrained_cfg: dict[str, Any] | None = None
    image_processor_type: str = "TimmWrapperImageProcessor"
    semantic_loss_ignore_index: int = 255

    def __post_init__(self, **kwargs):
        self._check_what_transformers_acts_on(**kwargs)
        self._check_labels()
        unknown = [name for name in kwargs if not hasattr(type(self), name) and name not in _TRANSFORMERS_FIELDS]
        if unknown:
            warnings.warn(f"Unknown configuration fields are kept but unused: {', '.join(unknown)}.", stacklevel=3)
        super().__post_init__(**kwargs)
        self.backbone_kwargs = {} if self.backbone_kwargs is None else self.backbone_kwargs
        self.check()
        self.backbone_kwargs = dict(self.backbone_kwargs)
        self.exits = None if self.exits is None else list(self.exits)

    def check(self) -> None:
        """Raise ValueError if a field has the wrong type or a value out of range.

        Models call it again when they are built, because ``from_pretrained(..., field=value)`` sets fields later.
        """
        if not isinstance(self.backbone, str) or not self.backbone:
            raise ValueError(f"backbone must be the name of a timm architecture, but got {self.backbone!r}.")
        if ":" in self.backbone or "/" in self.backbone:
            raise ValueError(
                f"A configuration may only name a timm architecture, but got backbone={self.backbone!r}. "
                "To load weights, use MultiExitForImageClassification.from_backbone."
            )
        if not isinstance(self.backbone_kwargs, dict) or not all(isinstance(key, str) for key in self.backbone_kwargs):
            raise ValueError(f"backbone_kwargs must be a dictionary of arguments, but got {self.backbone_kwargs!r}.")
        if refused := sorted(REFUSED_BACKBONE_KWARGS & self.backbone_kwargs.keys()):
            raise ValueError(
                f"backbone_kwargs must not contain {', '.join(refused)}: a configuration holds no weights and "
                "num_labels sets the classes. To start from weights use MultiExitForImageClassification.from_backbone."
            )
        numbers = filter(_is_number, tree_leaves(self.backbone_kwargs))
        if huge := [number for number in numbers if not abs(number) <= MAX_SIZE]:
            raise ValueError(
                f"Numbers in backbone_kwargs may be {MAX_SIZE:,} at most, but got {huge[0]!r} in "
                f"{self.backbone_kwargs}."
            )
        if self.exits is not None:
            self._check_exits()
        self._check_types()

    def _check_types(self) -> None:
        for name, alternative in (("exit_width", " or None"), ("pyramid_width", "")):
            width = getattr(self, name)
            if alternative and width is None:
                continue
            if not _is_integer(width) or not 1 <= width <= MAX_SIZE:
                raise ValueError(f"{name} must be an integer from 1 to {MAX_SIZE:,}{alternative}, but got {width!r}.")
        if not _is_integer(self.semantic_loss_ignore_index):
            raise ValueError(
                f"semantic_loss_ignore_index must be an integer, but got {self.semantic_loss_ignore_index!r}."
            )
        if not isinstance(self.image_processor_type, str):
            raise ValueError(f"image_processor_type must be a name, but got {self.image_processor_type!r}.")
        for name, only in (("chunk_size_feed_forward", 0), ("is_encoder_decoder", False)):
            if getattr(self, name) != only:
                raise ValueError(
                    f"{name} must be {only!r}, but got {getattr(self, name)!r}: it is for language models."
                )
        for name in ("small_input_stem", "early_exit", "ensemble"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, but got {getattr(self, name)!r}.")
        for name in ("exit_policy", "pretrained_cfg"):
            if not isinstance(getattr(self, name), (dict, type(None))):
                raise ValueError(f"{name} must be a dictionary or None, but got {getattr(self, name)!r}.")
        self._check_problem_type()
        self._check_image_size()

    def _check_problem_type(self) -> None:
        if self.problem_type not in (None, "single_label_classification", "multi_label_classification"):
            raise ValueError(
                "problem_type must be single_label_classification or None, or multi_label_classification, but got "
                f"{self.problem_type!r}: exits are trained by cross-entropy over classes, or of each class."
            )

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have any number of labels, as ``problem_type`` says, which may be set at any time.

        Raises:
            ValueError: If it was set to what this library does not have, such as ``regression``.
        """
        self._check_problem_type()
        return self.problem_type == "multi_label_classification"

    def _check_what_transformers_acts_on(self, num_labels: int | None = None, **kwargs) -> None:
        """Check the fields that transformers acts on before those of this class are set."""
        if num_labels is not None and (not _is_integer(num_labels) or not 1 <= num_labels <= MAX_CLASSES):
            raise ValueError(f"num_labels must be an integer from 1 to {MAX_CLASSES:,}, but got {num_labels!r}.")
        if kwargs.get("transformers_weights") is not None:
            raise ValueError(
                f"transformers_weights must not be given, but got {kwargs['transformers_weights']!r}: weights are "
                "read from model.safetensors only."
            )
        if "/" in str(kwargs.get("attn_implementation")):
            raise ValueError(
                f"attn_implementation must not name code to download, but got {kwargs['attn_implementation']!r}."
            )

    def _check_image_size(self) -> None:
        data = self.pretrained_cfg or {}
        shape, crop_pct = data.get("input_size") or [], data.get("crop_pct") or 1.0
        if not isinstance(shape, (list, tuple)) or not all(_is_integer(side) for side in shape):
            raise ValueError(f"pretrained_cfg['input_size'] must be three integers, but got {shape!r}.")
        if not isinstance(crop_pct, (int, float)) or not all(0 < side <= MAX_IMAGE_SIDE * crop_pct for side in shape):
            raise ValueError(
                f"Images are resized to input_size over crop_pct, at most {MAX_IMAGE_SIDE:,} pixels a side, but "
                f"pretrained_cfg has input_size={shape!r} and crop_pct={crop_pct!r}."
            )

    def _check_labels(self) -> None:
        """Check the fields that transformers reads first and refuses without naming them, or not at all."""
        if not isinstance(self.label2id, (dict, type(None))):
            raise ValueError(f"label2id must be a dictionary or None, but got {self.label2id!r}.")
        names = self.id2label
        is_dict = isinstance(names, dict) and len(names) > 0
        if names is not None and (not is_dict or {str(key) for key in names} != set(map(str, range(len(names))))):
            raise ValueError(f"id2label must be a dictionary that names all classes from 0, but got {names!r}.")
        dtype = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if self.dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype must be one of torch's, such as 'float32', but got {self.dtype!r}.")

    def _check_exits(self) -> None:
        if not isinstance(self.exits, (list, tuple)) or not all(_is_integer(stage) for stage in self.exits):
            raise ValueError(f"exits must be a list of stage indices such as [1, 2, 3], but got {self.exits!r}.")
        if any(later <= earlier for earlier, later in zip(self.exits, self.exits[1:], strict=False)):
            raise ValueError(
                f"exits must list each stage once, in increasing order, but got {list(self.exits)}. "
                f"Did you mean {sorted(set(self.exits))}?"
            )
