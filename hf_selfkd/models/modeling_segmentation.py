"""Multi-exit models for semantic segmentation: a timm backbone, a feature pyramid, a head and auxiliary heads."""

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SegformerImageProcessor
from transformers.image_utils import PILImageResampling

from .configuration import MultiExitConfig
from .heads import SegmentationHead
from .inputs import prepare_images, size_error
from .labels import label_maps
from .loss import resize_logits
from .modeling_base import MultiExitPreTrainedModel
from .outputs import MultiExitOutput
from .pyramid import PyramidHead, SegmentationPyramid, resize
from .stages import choose_stages
from .untrusted import rehearse

# Layers and levels of EfficientDet-D0, which FRSKD distils (section 4.3): P2 to P5 are feature maps of the
# backbone, P6 and P7 are pooled from P5.
NUM_LAYERS = 3
NUM_POOLED_LEVELS = 2


class MultiExitForSemanticSegmentation(MultiExitPreTrainedModel):
    """A timm backbone with a bidirectional feature pyramid, whose head is the final exit.

    The auxiliary exits are convolutional heads on the feature maps of the backbone's stages. Images may have any size
    that the backbone takes: they are padded at bottom and right to a multiple of its stride, usually 32, and the
    logits are cropped. Networks with windowed attention take one size only, or any with
    ``backbone_kwargs={"strict_img_size": False}``.

    Args:
        config: Configuration of the model.
        backbone: A finished timm model for ``config.backbone``, whose own head is removed; ``None`` to build one with
            timm's initialisation.

    Raises:
        ValueError: If all stages of the backbone have the same resolution, or the configuration sets something that
            only classification has.
    """

    task = "image-segmentation"
    model_tags = [
        "hf_selfkd",
        "timm",
        "image-segmentation",
        "semantic-segmentation",
        "multi-exit",
        "self-distillation",
    ]

    def __init__(self, config: MultiExitConfig, backbone: nn.Module | None = None):
        for name in ("exit_width", "exit_policy", "early_exit"):
            if getattr(config, name):
                raise ValueError(
                    f"{name} is for image classification, but got {name}={getattr(config, name)!r} for segmentation. "
                    "Leave it at its default; pyramid_width sets the width of the pyramid."
                )
        _check_problem_type(config)
        anatomy = rehearse(MultiExitForSemanticSegmentation, config) if backbone is None else None
        super().__init__(config, backbone, anatomy)
        if config.image_processor_type == MultiExitConfig.image_processor_type:
            config.image_processor_type = SegformerImageProcessor.__name__
        stages = self.anatomy.stages
        if len({stage.size for stage in stages}) == 1:
            raise ValueError(
                "Segmentation needs a backbone with feature maps of several resolutions, but all stages of "
                f"{config.backbone} return {stages[0].size[0]}x{stages[0].size[1]}. Choose one such as resnet18, "
                "convnext_tiny or swin_tiny_patch4_window7_224."
            )
        self.levels = choose_stages(stages, include_last=True)
        self.backbone.prune_intermediate_layers(list(range(len(stages))), prune_norm=True, prune_head=True)
        lowest = stages[self.levels[-1]]
        self.stride = 2 ** round(math.log2(lowest.image_size[0] / lowest.size[0]))
        width = config.pyramid_width
        channels = [stages[level].channels for level in self.levels]
        channels += NUM_POOLED_LEVELS * channels[-1:]
        self.pyramid = SegmentationPyramid(width, self.num_levels, NUM_LAYERS, channels)
        self.head = PyramidHead(width, self.num_levels, config.num_labels)
        self.exits = nn.ModuleList(
            SegmentationHead(stages[stage].channels, width, config.num_labels) for stage in self.exit_stages
        )
        self.post_init()

    @classmethod
    def from_backbone(cls, backbone: str | nn.Module, *, num_labels: int, pretrained: bool = False, **config):
        """Build a model on a timm backbone, pretrained or not.

        Args:
            backbone: A name or a timm model, as :meth:`MultiExitPreTrainedModel.from_backbone` takes them.
            num_labels: Number of classes, without the label of ignored pixels.
            pretrained: Whether to load timm's weights.
            config: Fields of :class:`MultiExitConfig`.

        Raises:
            ValueError: As the constructor does.
        """
        return super().from_backbone(backbone, pretrained=pretrained, num_labels=num_labels, **config)

    @property
    def num_levels(self) -> int:
        """Number of levels of the pyramid."""
        return len(self.levels) + NUM_POOLED_LEVELS

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MultiExitOutput | tuple:
        """Return the logits of all exits, at the highest resolution of the pyramid.

        Args:
            pixel_values: ``(batch, channels, height, width)``, of any floating point type; networks of grey images
                take RGB too.
            labels: Class indices ``(batch, height, width)``, ``config.semantic_loss_ignore_index`` or -100 for
                ignored pixels; adds ``loss``, for which the logits are interpolated to their size.
            output_hidden_states: Whether to return the feature maps of the pyramid; always so in training, unless
                ``returns_maps`` is false.
            return_dict: ``False`` returns a tuple. ``None``, here and above, takes the configuration's field.

        Raises:
            ValueError: If ``labels`` have another size than the images or hold a class that the model does not have;
                if the images are integers, or the backbone does not take their size or channels; or in training, for
                a single image that is too small.
        """
        _check_problem_type(self.config)
        output_hidden_states, return_dict = self._as_configured(output_hidden_states, return_dict)
        pixel_values = prepare_images(self.backbone, pixel_values, self.num_channels)
        if labels is not None:
            labels = label_maps(
                labels,
                pixel_values.shape[-2:],
                self.config.num_labels,
                self.config.semantic_loss_ignore_index,
                "A batch",
                check_values=not torch.compiler.is_compiling(),
            )
        height, width = pixel_values.shape[-2:]
        padded = F.pad(pixel_values, (0, -width % self.stride, 0, -height % self.stride))
        try:
            feature_maps = self.backbone.forward_intermediates(padded, intermediates_only=True)
        except AssertionError as error:  # timm's, of networks built for images of one size
            raise size_error(self.config.backbone, padded.shape[-2:], error) from error
        levels = self._levels_of(feature_maps)
        if self.training and levels[-1][:, 0].numel() == 1:
            raise ValueError(
                f"Batch norm cannot train on a single image of {height}x{width} pixels, whose coarsest feature map is "
                "one pixel. Use batches of two or more (dataloader_drop_last for the last one), or larger images."
            )
        pyramid = self.pyramid(levels)
        size = pyramid[0].shape[-2:]
        exit_logits = []
        for head, stage in zip(self.exits, self.exit_stages, strict=True):
            feature_map = feature_maps[stage].detach() if self.detach_exits else feature_maps[stage]
            exit_logits.append(resize_logits(head(feature_map), size))
        exit_logits.append(self.head(pyramid))
        height, width = (
            -(-side * cells // padded_side)
            for side, cells, padded_side in zip((height, width), size, padded.shape[-2:], strict=True)
        )
        return self._finish(
            pixel_values,
            labels,
            output_hidden_states,
            return_dict,
            exit_logits=tuple(logits[..., :height, :width] for logits in exit_logits),
            exit_maps=pyramid if self.training or output_hidden_states else None,
        )

    def _levels_of(self, feature_maps: list[Tensor]) -> list[Tensor]:
        levels = [feature_maps[level] for level in self.levels]
        for _ in range(NUM_POOLED_LEVELS):
            height, width = levels[-1].shape[-2:]
            levels.append(resize(levels[-1], ((height + 1) // 2, (width + 1) // 2)))
        return levels

    def create_image_processor(self) -> SegformerImageProcessor:
        """Build the image processor that is saved with the model, from ``config.pretrained_cfg``.

        It resizes images to ``input_size``; its ``post_process_semantic_segmentation`` turns logits into class maps.
        """
        data = self.config.pretrained_cfg
        grey = self.num_channels == 1  # the network itself converts RGB, which is what pipelines read
        return SegformerImageProcessor(
            size=dict(zip(("height", "width"), data["input_size"][1:], strict=True)),
            image_mean=list(data["mean"]) * (3 if grey else 1),
            image_std=list(data["std"]) * (3 if grey else 1),
            do_convert_rgb=grey or None,
            resample=PILImageResampling[data.get("interpolation", "bilinear").upper()],
        )

    def _save_image_processor(self, folder: str | os.PathLike) -> None:
        if self.config.image_processor_type == SegformerImageProcessor.__name__:
            self.create_image_processor().save_pretrained(folder)


def _check_problem_type(config: MultiExitConfig) -> None:
    if config.is_multi_label:
        raise ValueError(
            f"problem_type={config.problem_type!r} is for image classification, but the model is for segmentation, "
            "where a pixel has one class. Set problem_type to None."
        )
