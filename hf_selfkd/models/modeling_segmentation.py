"""Multi-exit models for semantic segmentation: a timm backbone, a feature pyramid, a head and auxiliary heads."""

import math
import os
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SegformerImageProcessor
from transformers.image_utils import PILImageResampling

from .configuration import MultiExitConfig
from .heads import SegmentationHead
from .loss import cross_entropy, resize_logits
from .modeling_base import MultiExitPreTrainedModel
from .outputs import MultiExitOutput
from .pyramid import PyramidHead, SegmentationPyramid, resize
from .stages import deepest_resolutions
from .timm_factory import create_recorded
from .untrusted import rehearse

# Layers and levels of EfficientDet-D0, which FRSKD distils (section 4.3): P2 to P5 are maps of the backbone, P6 and P7
# are pooled from P5.
NUM_LAYERS = 3
NUM_POOLED_LEVELS = 2


class MultiExitForSemanticSegmentation(MultiExitPreTrainedModel):
    """A timm backbone under a bidirectional feature pyramid; its head is the deepest exit.

    The auxiliary exits are convolutional heads on the maps of the backbone's stages. Images may have any size
    that the backbone takes: they are padded at bottom and right to a multiple of its stride, mostly 32, and the logits
    cropped. Networks of windows take one size only, or any with ``backbone_kwargs={"strict_img_size": False}``.

    Args:
        config: What to build.
        backbone: A finished timm model for ``config.backbone``, whose own head is dropped; ``None`` to build one with
            timm's initialisation.

    Raises:
        ValueError: If all stages of the backbone have the same resolution, or the configuration asks for something
            that only classification has.
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
        if backbone is None:
            rehearse(MultiExitForSemanticSegmentation, config)
        super().__init__(config, backbone)
        config.image_processor_type = "SegformerImageProcessor"
        stages = self.anatomy.stages
        self.levels = deepest_resolutions([stage.size for stage in stages])
        if len(self.levels) == 1:
            raise ValueError(
                f"Segmentation needs a backbone with maps of several resolutions, but all stages of {config.backbone} "
                f"give {stages[0].size[0]}x{stages[0].size[1]}. Choose one such as resnet18, convnext_tiny or "
                "swin_tiny_patch4_window7_224."
            )
        self.backbone.prune_intermediate_layers(list(range(len(stages))), prune_norm=True, prune_head=True)
        deepest = stages[self.levels[-1]]
        self.stride = 2 ** round(math.log2(deepest.image_size[0] / deepest.size[0]))
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
    def from_backbone(cls, backbone: str, *, num_labels: int, pretrained: bool = False, **config):
        """Put pyramid and heads on a timm model, with weights or without.

        Args:
            backbone: All that ``timm.create_model`` takes, ``hf-hub:`` and ``local-dir:`` included. A file of weights
                goes into ``backbone_kwargs={"checkpoint_path": ...}``.
            num_labels: Number of classes, void not counted.
            pretrained: Whether to fetch timm's weights.
            config: Fields of :class:`MultiExitConfig`.

        Raises:
            ValueError: As the constructor does.
        """
        built, model = create_recorded(backbone, pretrained, num_labels, config)
        return cls(built, backbone=model)

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
        """Answer with every exit, at the resolution of the pyramid's finest map.

        Args:
            pixel_values: ``(batch, channels, height, width)``.
            labels: Class indices ``(batch, height, width)``, ``config.semantic_loss_ignore_index`` or -100 where there
                is none; adds ``loss``, for which the logits are interpolated to their size.
            output_hidden_states: Whether to return the maps of the pyramid; always so in training, unless
                ``returns_maps`` is false.
            return_dict: ``False`` returns a tuple.

        Raises:
            ValueError: If ``labels`` have another size than the images, or name a class that the model lacks; if the
                backbone does not take images of this size; or in training, for a single image that is too small.
        """
        if labels is not None:
            labels = self._checked(labels, pixel_values)
        height, width = pixel_values.shape[-2:]
        padded = F.pad(pixel_values, (0, -width % self.stride, 0, -height % self.stride))
        try:
            maps = self.backbone.forward_intermediates(padded, intermediates_only=True)
        except AssertionError as error:  # timm's, of networks built for images of one size
            raise ValueError(
                f"{self.config.backbone} does not take images of {height}x{width} pixels, padded to "
                f"{padded.shape[-2]}x{padded.shape[-1]}: {error} Build it for this size with "
                "backbone_kwargs={'img_size': ...} or, where it has the option, {'strict_img_size': False}."
            ) from error
        levels = self._levels_of(maps)
        if self.training and levels[-1][:, 0].numel() == 1:
            raise ValueError(
                f"Batch norm cannot train on a single image of {height}x{width} pixels, whose coarsest map is one "
                "pixel. Give batches of two or more (dataloader_drop_last for the last one), or larger images."
            )
        pyramid = self.pyramid(levels)
        size = pyramid[0].shape[-2:]
        exit_logits = []
        for head, stage in zip(self.exits, self.exit_stages, strict=True):
            stage_map = maps[stage].detach() if self.detach_exits else maps[stage]
            exit_logits.append(resize_logits(head(stage_map), size))
        exit_logits.append(self.head(pyramid))
        height, width = (
            -(-side * cells // whole)
            for side, cells, whole in zip((height, width), size, padded.shape[-2:], strict=True)
        )
        exit_logits = [logits[..., :height, :width] for logits in exit_logits]
        is_ensemble = self.config.ensemble and not self.training
        logits = torch.stack(exit_logits).mean(dim=0) if is_ensemble else exit_logits[-1]
        output = MultiExitOutput(
            loss=None if labels is None else cross_entropy(logits, labels),
            logits=logits,
            exit_logits=tuple(exit_logits),
            exit_maps=pyramid if self.training or output_hidden_states else None,
        )
        if self.training and self.scaffold is not None:
            output.scaffold = self.scaffold(pixel_values, output)
        if not (self.returns_maps or output_hidden_states):
            output = replace(output, exit_maps=None)
        return output if return_dict is not False else output.to_tuple()

    def _levels_of(self, maps: list[Tensor]) -> list[Tensor]:
        levels = [maps[level] for level in self.levels]
        for _ in range(NUM_POOLED_LEVELS):
            height, width = levels[-1].shape[-2:]
            levels.append(resize(levels[-1], ((height + 1) // 2, (width + 1) // 2)))
        return levels

    def _checked(self, labels: Tensor, pixel_values: Tensor) -> Tensor:
        if labels.shape != pixel_values.shape[:1] + pixel_values.shape[2:]:
            raise ValueError(
                f"labels must be maps of the images' size, {tuple(pixel_values.shape[:1] + pixel_values.shape[2:])}, "
                f"but got {tuple(labels.shape)}. Transform images and maps together."
            )
        labels = labels.long().masked_fill(labels == self.config.semantic_loss_ignore_index, -100)
        if not torch.compiler.is_compiling():
            wrong = labels[(labels != -100) & ((labels < 0) | (labels >= self.config.num_labels))]
            if len(wrong):
                raise ValueError(
                    f"labels hold class {wrong[0].item()}, but the model has {self.config.num_labels} classes (0 to "
                    f"{self.config.num_labels - 1}) and ignores {self.config.semantic_loss_ignore_index}. Build the "
                    "model with num_labels and semantic_loss_ignore_index of the data."
                )
        return labels

    def create_image_processor(self) -> SegformerImageProcessor:
        """Build the image processor that is saved with the model, from ``config.pretrained_cfg``.

        It resizes images to ``input_size``; ``post_process_semantic_segmentation`` turns logits into maps.
        """
        data = self.config.pretrained_cfg
        return SegformerImageProcessor(
            size=dict(zip(("height", "width"), data["input_size"][1:], strict=True)),
            image_mean=list(data["mean"]),
            image_std=list(data["std"]),
            resample=PILImageResampling[data.get("interpolation", "bilinear").upper()],
        )

    def _save_image_processor(self, folder: str | os.PathLike) -> None:
        self.create_image_processor().save_pretrained(folder)
