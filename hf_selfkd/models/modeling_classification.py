"""Multi-exit models for image classification: a timm backbone with an exit head at some of its stages."""

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .branches import Tail, copy_tail
from .configuration import MultiExitConfig
from .dry_run import input_shape
from .early_exit import exit_early
from .exit_policy import ExitPolicy, resolve_policy
from .heads import create_head
from .hooks import Collector, check_seen, join_features, run
from .inputs import prepare_images, size_error
from .modeling_base import MultiExitPreTrainedModel
from .multi_label import MULTI_LABEL
from .outputs import EarlyExitOutput, MultiExitOutput
from .stages import choose_stages
from .timm_checkpoint import save_timm_checkpoint
from .timm_quirks import classifiers
from .untrusted import rehearse


class MultiExitForImageClassification(MultiExitPreTrainedModel):
    """A timm backbone with auxiliary exits; its own head is the final exit.

    Args:
        config: Configuration of the model.
        backbone: A finished timm model for ``config.backbone``; ``None`` to build one with timm's initialisation.
    """

    auto_classes = {
        "AutoModel": "modeling_classification.MultiExitModel",
        "AutoModelForImageClassification": "modeling_classification.MultiExitForImageClassification",
    }

    def __init__(self, config: MultiExitConfig, backbone: nn.Module | None = None):
        anatomy = rehearse(MultiExitForImageClassification, config) if backbone is None else None
        super().__init__(config, backbone, anatomy)
        stages, width = self.anatomy.stages, config.exit_width or self.anatomy.width
        self.exits = nn.ModuleList(
            create_head(stages[stage], stages[-1], width, config.num_labels) for stage in self.exit_stages
        )
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MultiExitOutput | EarlyExitOutput | tuple:
        """Return the outputs of all exits, or, with ``config.early_exit``, those of the exit of each image.

        In training, with labels and with hidden states all exits are always computed.

        Args:
            pixel_values: ``(batch, channels, height, width)``, of any floating point type; networks of grey images
                take RGB too.
            labels: Class indices ``(batch,)`` or probabilities ``(batch, classes)``; adds ``loss``. For multi-label
                classification as :func:`~hf_selfkd.models.multi_label.binary_cross_entropy` takes them.
            output_hidden_states: Whether to return the feature maps of all stages; always so in training, unless
                ``returns_maps`` is false.
            return_dict: ``False`` returns a tuple. ``None``, here and above, takes the configuration's field.

        Raises:
            ValueError: If the images are integers, or the network does not take their size or number of channels.
        """
        output_hidden_states, return_dict = self._as_configured(output_hidden_states, return_dict)
        if self.config.early_exit and not self.training and labels is None and not output_hidden_states:
            early = self.early_exit(pixel_values)
            return early if return_dict is not False else early.to_tuple()
        pixel_values = prepare_images(self.backbone, pixel_values, self.num_channels)
        seen = Collector()
        try:
            logits = run(self.backbone, self.anatomy, pixel_values, seen)
        except AssertionError as error:  # timm's, of networks built for images of one size
            raise size_error(self.config.backbone, pixel_values.shape[-2:], error) from error
        check_seen(self.backbone, self.anatomy, seen)
        image_size = tuple(pixel_values.shape[-2:])
        outputs = []
        for head, stage in zip(self.exits, self.exit_stages, strict=True):
            feature_map = self._feature_map(stage, seen.outputs[stage], image_size)
            outputs.append(head(feature_map.detach() if self.detach_exits else feature_map))
        outputs.append((logits, join_features(seen.features)))
        exit_logits, exit_features = zip(*outputs, strict=True)
        exit_maps = stage_outputs = None
        if self.training or output_hidden_states:
            stage_outputs = tuple(seen.outputs[stage] for stage in range(len(self.anatomy.stages)))
            exit_maps = tuple(
                self._feature_map(stage, output, image_size) for stage, output in enumerate(stage_outputs)
            )
        return self._finish(
            pixel_values,
            labels,
            output_hidden_states,
            return_dict,
            exit_logits=exit_logits,
            exit_features=exit_features,
            exit_maps=exit_maps,
            stage_outputs=stage_outputs,
        )

    @property
    def task(self) -> str:
        """The task that ``config.problem_type`` names, which may be set at any time."""
        return MULTI_LABEL if self.config.is_multi_label else "image-classification"

    @property
    def classifiers(self) -> list[nn.Module]:
        """The modules that map features to the final exit's logits: one linear module, or several to average."""
        return classifiers(self.backbone)

    def save_timm(self, folder: str | os.PathLike) -> None:
        """Write the backbone alone as a timm checkpoint, whose logits are those of the final exit.

        ``timm.create_model("local-dir:folder", pretrained=True)`` loads it, after an upload also as ``hf-hub:``. The
        projection that ``exit_width`` puts in front of the classifier is folded into the classifier.

        Args:
            folder: Folder for ``model.safetensors`` and timm's ``config.json``; not one of :meth:`save_pretrained`,
                whose files have the same names.

        Raises:
            ValueError: If the model has ``small_input_stem``, which no timm architecture has, or if ``folder`` holds
                a multi-exit model.
        """
        save_timm_checkpoint(self.backbone, self.config, folder)

    def copy_tail(self, stage: int | None = None) -> Tail:
        """Copy all layers after a stage, newly initialised: a branch on this model's trunk.

        The copy maps ``output.stage_outputs[stage]`` to logits ``(batch, classes)`` and features ``(batch, width)``.
        It shares nothing with the model, and its state has the names of ``model.backbone``.

        Args:
            stage: Index of the stage; ``None`` is that of the last default exit: the last stage before the lowest
                resolution, or after three quarters of an isotropic network.

        Raises:
            ValueError: If there is no such stage, or the network is not sequential there.
        """
        stages = self.anatomy.stages
        if stage is None:
            *_, stage = choose_stages(stages, include_last=False) or [len(stages)]
        channels, *image_size = input_shape(self.backbone)
        if self.config.small_input_stem:
            image_size = (32, 32)
        create = partial(self._create_backbone, self.backbone.num_classes)
        return copy_tail(self.backbone, self.anatomy, stage, create, (channels, *image_size))

    # The shape of a shrinking batch depends on the data, so a compiled model runs this part uncompiled.
    @torch.compiler.disable
    @torch.no_grad()
    def early_exit(
        self,
        pixel_values: Tensor,
        policy: ExitPolicy | None = None,
        thresholds: Tensor | None = None,
        *,
        target_cost: float | None = None,
    ) -> EarlyExitOutput:
        """Exit each image at the exit that the policy selects; the rest of the network runs on the remaining images.

        The outputs equal those of computing all exits and choosing afterwards. If the network is not sequential at its
        exits, which is tested on a few random inputs before the first batch, the complete batch runs until its last
        image has exited, with a warning. If stages do not end in order, all exits are computed. On a CPU, images run
        up to the first exit in small chunks that fit its caches.

        Args:
            pixel_values: ``(batch, channels, height, width)``.
            policy: Decides when an image may exit; ``None`` takes ``config.exit_policy``.
            thresholds: Thresholds of each image, ``(batch, auxiliary exits)``, in the place of the policy's, such as
                those of ``policy.at(target_cost)`` with a cost per image; ``None`` for the policy's.
            target_cost: Moves along the frontier of the policy, see :meth:`ExitPolicy.at`.

        Raises:
            ValueError: If the model is in training mode, the policy is missing, for another number of exits or without
                a frontier for ``target_cost``, both ``thresholds`` and ``target_cost`` are given, thresholds have
                another shape or are negative or NaN, or :meth:`forward` does not take the images.
        """
        if self.training:
            raise ValueError("early_exit needs a model in eval mode, but it is in training mode. Call model.eval().")
        if thresholds is not None and target_cost is not None:
            raise ValueError("thresholds and target_cost both decide when images exit. Give one of them.")
        config = self.config
        policy = resolve_policy(policy, config.exit_policy, self.num_exits, multi_label=config.is_multi_label)
        policy = policy if target_cost is None else policy.at(target_cost)
        pixel_values = prepare_images(self.backbone, pixel_values, self.num_channels)
        try:
            return exit_early(self, pixel_values, policy, thresholds)
        except AssertionError as error:
            raise size_error(self.config.backbone, pixel_values.shape[-2:], error) from error

    def logits_at_exit(self, exit: int, stage_output: Any, image_size: tuple[int, int]) -> Tensor:
        """Return the logits ``(batch, classes)`` of an auxiliary exit.

        Args:
            exit: Index of the exit, from 0.
            stage_output: Raw output of its stage.
            image_size: Height and width of the images.
        """
        return self.exits[exit](self._feature_map(self.exit_stages[exit], stage_output, image_size))[0]

    def _feature_map(self, stage: int, output: Any, image_size: tuple[int, int]) -> Tensor:
        return self.anatomy.stages[stage].to_feature_map(output, image_size) if self.anatomy.hooked else output


class MultiExitModel(MultiExitForImageClassification):
    """The features of a multi-exit classifier: what ``AutoModel`` and ``pipeline("image-feature-extraction")`` load.

    Args:
        config: Configuration of the model.
        backbone: As for :class:`MultiExitForImageClassification`.

    Raises:
        ValueError: If the checkpoint is one for segmentation, whose backbone has no head to pool with.
    """

    def __init__(self, config: MultiExitConfig, backbone: nn.Module | None = None):
        if any("Segmentation" in name for name in config.architectures or []):
            raise ValueError(
                "AutoModel gives the features of a classifier, but this is a checkpoint for segmentation. Load it "
                "with AutoModelForSemanticSegmentation and call it with output_hidden_states=True."
            )
        super().__init__(config, backbone)

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None
    ) -> BaseModelOutputWithPooling | tuple:
        """Return the features of the backbone, as transformers' own wrapper of timm models does.

        The features of every exit are the ``exit_features`` of :class:`MultiExitForImageClassification`.

        Args:
            pixel_values: ``(batch, channels, height, width)``.
            output_hidden_states: Whether to return the feature maps of all stages, each ``(batch, channels, height,
                width)``.
            return_dict: ``False`` returns a tuple.

        Returns:
            ``last_hidden_state``, timm's ``forward_features``: ``(batch, channels, height, width)`` or, of a
            transformer, ``(batch, tokens, width)``; and ``pooler_output`` ``(batch, width)``, its pre-logits.
        """
        hidden_states = None
        if output_hidden_states:
            last, hidden_states = self.backbone.forward_intermediates(pixel_values)
        else:
            last = self.backbone.forward_features(pixel_values)
        output = BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=self.backbone.forward_head(last, pre_logits=True),
            hidden_states=None if hidden_states is None else tuple(hidden_states),
        )
        return output if return_dict is not False else output.to_tuple()
