"""Multi-exit models: a timm backbone, exits at its stages, one answer per exit."""

import os
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .branches import Tail, copy_tail
from .configuration import MultiExitConfig
from .dry_run import input_shape
from .early_exit import EarlyExit, can_shrink
from .exit_policy import ExitPolicy, resolve_policy
from .heads import ConvExit, TokenExit
from .hooks import Collector, join_features, run
from .loss import cross_entropy
from .modeling_base import MultiExitPreTrainedModel
from .outputs import EarlyExitOutput, MultiExitOutput
from .stages import Stage, default_exits
from .timm_checkpoint import save_timm_checkpoint
from .timm_factory import create_recorded
from .timm_quirks import classifiers
from .untrusted import rehearse


class MultiExitForImageClassification(MultiExitPreTrainedModel):
    """A timm backbone with auxiliary exits; its own head is the deepest exit.

    Args:
        config: What to build.
        backbone: A finished timm model for ``config.backbone``; ``None`` to build one with timm's initialisation.
    """

    def __init__(self, config: MultiExitConfig, backbone: nn.Module | None = None):
        if backbone is None:
            rehearse(MultiExitForImageClassification, config)
        super().__init__(config, backbone)
        stages = self.anatomy.stages
        self.exits = nn.ModuleList(
            self._create_exit(stages[stage], stages[-1], config.exit_width or self.anatomy.width)
            for stage in self.exit_stages
        )
        self.post_init()

    def _create_exit(self, stage: Stage, last: Stage, width: int) -> nn.Module:
        if stage.layout == "NLC":
            return TokenExit(stage.channels, width, self.config.num_labels)
        stride = max(1, round(stage.size[0] / last.size[0]))
        return ConvExit(stage.channels, width, self.config.num_labels, stride)

    @classmethod
    def from_backbone(cls, backbone: str, *, pretrained: bool = False, num_labels: int | None = None, **config):
        """Give exits to a timm model, with weights or without.

        Args:
            backbone: All that ``timm.create_model`` takes, ``hf-hub:`` and ``local-dir:`` included. A file of weights
                goes into ``backbone_kwargs={"checkpoint_path": ...}``.
            pretrained: Whether to fetch timm's weights.
            num_labels: Number of classes; ``None`` keeps timm's classifier and, if pretrained, its label names.
            config: Fields of :class:`MultiExitConfig`.

        Raises:
            ValueError: If ``exit_width`` would replace a pretrained classifier that was meant to be kept.
        """
        if pretrained and num_labels is None and config.get("exit_width") is not None:
            raise ValueError(
                "exit_width puts a new classifier behind the backbone, so the pretrained one would be lost. "
                "Give num_labels if that is meant, or leave exit_width at None."
            )
        built, model = create_recorded(backbone, pretrained, num_labels, config, config.get("exit_width"))
        return cls(built, backbone=model)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MultiExitOutput | EarlyExitOutput | tuple:
        """Answer with every exit, or, with ``config.early_exit``, with the one at which each image leaves.

        Training, labels and hidden states always get every exit.

        Args:
            pixel_values: ``(batch, channels, height, width)``.
            labels: Class indices ``(batch,)`` or probabilities ``(batch, classes)``; adds ``loss``.
            output_hidden_states: Whether to return the maps of all stages; always so in training, unless
                ``returns_maps`` is false.
            return_dict: ``False`` returns a tuple.
        """
        if self.config.early_exit and not self.training and labels is None and not output_hidden_states:
            early = self.early_exit(pixel_values)
            return early if return_dict is not False else early.to_tuple()
        seen = Collector()
        logits = run(self.backbone, self.anatomy, pixel_values, seen)
        image_size = tuple(pixel_values.shape[-2:])
        answers = []
        for head, stage in zip(self.exits, self.exit_stages, strict=True):
            stage_map = self._stage_map(stage, seen.outputs[stage], image_size)
            answers.append(head(stage_map.detach() if self.detach_exits else stage_map))
        answers.append((logits, join_features(seen.features)))
        exit_logits, exit_features = zip(*answers, strict=True)
        if not self.training and self.config.ensemble:
            logits = torch.stack(exit_logits).mean(dim=0)
        exit_maps = stage_outputs = None
        if self.training or output_hidden_states:
            stage_outputs = tuple(seen.outputs[stage] for stage in range(len(self.anatomy.stages)))
            exit_maps = tuple(
                self._stage_map(stage, stage_output, image_size) for stage, stage_output in enumerate(stage_outputs)
            )
        output = MultiExitOutput(
            loss=None if labels is None else cross_entropy(logits, labels),
            logits=logits,
            exit_logits=exit_logits,
            exit_features=exit_features,
            exit_maps=exit_maps,
            stage_outputs=stage_outputs,
        )
        if self.training and self.scaffold is not None:
            output.scaffold = self.scaffold(pixel_values, output)
        if not (self.returns_maps or output_hidden_states):
            output = replace(output, exit_maps=None, stage_outputs=None)
        return output if return_dict is not False else output.to_tuple()

    @property
    def classifiers(self) -> list[nn.Module]:
        """What turns features into the deepest exit's logits: one linear module, or several that are averaged."""
        return classifiers(self.backbone)

    def save_timm(self, folder: str | os.PathLike) -> None:
        """Write the backbone alone as a timm checkpoint, whose logits are those of the deepest exit.

        ``timm.create_model("local-dir:folder", pretrained=True)`` loads it, and ``hf-hub:`` once it was uploaded. The
        projection that ``exit_width`` puts in front of the classifier is folded into the classifier.

        Args:
            folder: Where to write ``model.safetensors`` and timm's ``config.json``; not where :meth:`save_pretrained`
                wrote, whose files have the same names.

        Raises:
            ValueError: If the model has ``small_input_stem``, which no timm architecture has, or if ``folder`` holds
                a multi-exit model.
        """
        save_timm_checkpoint(self.backbone, self.config, folder)

    def copy_tail(self, stage: int | None = None) -> Tail:
        """Copy everything behind a stage, freshly initialised: a branch that reads this model's trunk.

        The copy maps ``output.stage_outputs[stage]`` to logits ``(batch, classes)`` and features ``(batch, width)``.
        It shares nothing with the model, and its state has the names of ``model.backbone``.

        Args:
            stage: Index of the stage; ``None`` is that of the deepest default exit: the last of the resolution before
                the final one, or after three quarters of an isotropic network.

        Raises:
            ValueError: If there is no such stage or the network is no chain there.
        """
        stages = self.anatomy.stages
        if stage is None:
            *_, stage = default_exits(stages) or [len(stages)]
        channels, *image_size = input_shape(self.backbone)
        if self.config.small_input_stem:
            image_size = (32, 32)
        create = partial(self._create_backbone, self.backbone.num_classes)
        return copy_tail(self.backbone, self.anatomy, stage, create, (channels, *image_size))

    # The shape of a shrinking batch depends on the data, so this part of a compiled model runs uncompiled.
    @torch.compiler.disable
    @torch.no_grad()
    def early_exit(self, pixel_values: Tensor, policy: ExitPolicy | None = None) -> EarlyExitOutput:
        """Stop computing for each image where the policy says so; the rest of the network runs on the others.

        Answers are those of running all exits and letting the policy decide. Where the network is no chain at its
        exits, found out with a few made-up images before the first batch, the whole batch runs on until its last
        image has decided, with a warning. Where stages do not end in their order, all exits are
        computed. On a CPU the images run to the first exit in small parts, which its caches hold.

        Args:
            pixel_values: ``(batch, channels, height, width)``.
            policy: When an image may leave; ``None`` takes ``config.exit_policy``.

        Raises:
            ValueError: If the model is in training mode, or the policy is missing or for another number of exits.
        """
        if self.training:
            raise ValueError("early_exit needs a model in eval mode, but it is in training mode. Call model.eval().")
        policy = resolve_policy(policy, self.config.exit_policy, self.num_exits)
        if not self.anatomy.in_order and len(self.exit_stages) > 1:
            return self._exit_late(pixel_values, policy)
        network = partial(run, self.backbone, self.anatomy)
        answer = partial(self._exit_logits, tuple(pixel_values.shape[-2:]))
        exits = {stage: exit for exit, stage in enumerate(self.exit_stages)}
        if self._shrinks is None and len(pixel_values) > 1:
            self._shrinks = can_shrink(network, answer, exits, pixel_values[:1].to(self.dtype))
        needed = {stage: exit for stage, exit in exits.items() if policy.listens(exit)}
        visitor = EarlyExit(policy, answer, needed, shrink=self._shrinks is not False)
        return visitor.run(network, pixel_values)

    def _exit_late(self, pixel_values: Tensor, policy: ExitPolicy) -> EarlyExitOutput:
        """Run all exits, then let the policy decide, in the order of the exits."""
        warnings.warn(
            f"The stages of {self.config.backbone} do not end in their order, so early_exit computes all exits. "
            "With one auxiliary exit it saves time.",
            stacklevel=3,
        )
        exit_logits = self(pixel_values, output_hidden_states=True).exit_logits  # asks for every exit
        exit_index, logits = policy.decide(exit_logits)
        confidences = torch.stack([policy.score(exit, answer)[1] for exit, answer in enumerate(exit_logits)])
        return EarlyExitOutput(logits, exit_index, confidences.gather(0, exit_index.unsqueeze(0))[0])

    def _exit_logits(self, image_size: tuple[int, int], exit: int, output: Any) -> Tensor:
        return self.exits[exit](self._stage_map(self.exit_stages[exit], output, image_size))[0]

    def _stage_map(self, index: int, output: Any, image_size: tuple[int, int]) -> Tensor:
        return output if not self.anatomy.hooked else self.anatomy.stages[index].to_map(output, image_size)
