"""Multi-exit models: a timm backbone, exits at its stages, one answer per exit."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .backbone import (
    FEATURES,
    Stage,
    _classifiers,
    attach_hooks,
    default_exits,
    input_shape,
    join_features,
    measure,
    run,
)
from .configuration import REFUSED_BACKBONE_KWARGS, MultiExitConfig
from .creation import create_backbone
from .exits import ConvExit, TokenExit
from .functional import cross_entropy
from .outputs import MultiExitOutput
from .tail import Tail, copy_tail


class _Collector:
    """Visitor of a call that computes all exits: keeps what the hooks see."""

    def __init__(self):
        self.outputs: dict[int, Any] = {}
        self.features: list[Tensor] = []

    def __call__(self, index: int, output: Any) -> None:
        if index == FEATURES:
            self.features.append(output)
        else:
            self.outputs[index] = output


class MultiExitPreTrainedModel(PreTrainedModel):
    """What classification and segmentation share: building, initialising, saving and freezing."""

    config_class = MultiExitConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    model_tags = ["multi-exit", "self-distillation", "early-exit", "timm"]
    task = "image-classification"

    # Set by the trainer, or in your own loop: exits read detached maps, so that the backbone learns as without them.
    detach_exits = False

    def __init__(self, config: MultiExitConfig, backbone: nn.Module | None = None):
        super().__init__(config)
        self.backbone = backbone if backbone is not None else self._create_backbone(config.num_labels)
        self.anatomy = measure(lambda: self._create_backbone(self.backbone.num_classes))
        attach_hooks(self.backbone, self.anatomy)
        self._backbone_frozen = False
        self.scaffold: nn.Module | None = None
        if config.pretrained_cfg is None:
            config.pretrained_cfg = _data_config(self.backbone, config.small_input_stem)
        self.exit_stages = self._choose_exits()

    def _create_backbone(self, num_classes: int) -> nn.Module:
        return create_backbone(
            self.config.backbone,
            num_classes=num_classes,
            small_input_stem=self.config.small_input_stem,
            exit_width=self.config.exit_width,
            **self.config.backbone_kwargs,
        )

    def _choose_exits(self) -> list[int]:
        stages = self.anatomy.stages
        if self.config.exits is None:
            return default_exits(stages)
        for stage in self.config.exits:
            if not 0 <= stage < len(stages):
                raise ValueError(
                    f"{self.config.backbone} has {len(stages)} stages (0 to {len(stages) - 1}), "
                    f"but exits asks for stage {stage}."
                )
        return list(self.config.exits)

    def post_init(self):
        """Finish the construction without drawing timm's initialisation again."""
        if self.device.type != "meta":
            for module in self.modules():
                module._is_hf_initialized = True
        first_names: dict[Tensor, str] = {}
        shared = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if first_names.setdefault(parameter, name) != name:
                shared[name] = first_names[parameter]
        self._tied_weights_keys = shared or None
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for what a checkpoint did not hold: buffers that are not saved, and heads for
        # another number of classes. Weights are never left to it otherwise, see post_init.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs) -> None:
        self.backbone.set_grad_checkpointing(enable)

    def get_input_embeddings(self):
        """Images have no token embeddings."""
        return None

    @property
    def num_exits(self) -> int:
        """Number of exits, the deepest included."""
        return len(self.exit_stages) + 1

    def freeze_backbone(self) -> None:
        """Keep the backbone as it is: no gradient, and eval mode also under ``train()``.

        With ``deep_supervision`` this adds exits to a finished model without changing its answers.
        """
        self._backbone_frozen = True
        self.backbone.requires_grad_(False)
        self.backbone.eval()

    def train(self, mode: bool = True):
        """Switch between training and evaluation; a frozen backbone stays in evaluation."""
        super().train(mode)
        if self._backbone_frozen:
            self.backbone.eval()
        return self

    def save_pretrained(self, save_directory, *args, state_dict: dict[str, Tensor] | None = None, **kwargs) -> None:
        """Save what ships, in safetensors: never the scaffold. See ``PreTrainedModel.save_pretrained``."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        shipped = {name: tensor for name, tensor in state_dict.items() if not name.startswith("scaffold.")}
        super().save_pretrained(save_directory, *args, state_dict=shipped, **kwargs)


def _data_config(backbone: nn.Module, small_input_stem: bool) -> dict[str, Any]:
    """Return what timm's ``resolve_data_config`` reads, as JSON has it."""
    keys = ("architecture", "input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode", "fixed_input_size")
    cfg = {key: backbone.pretrained_cfg[key] for key in keys if key in backbone.pretrained_cfg}
    if small_input_stem:
        cfg.update(input_size=(3, 32, 32), crop_pct=1.0)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in cfg.items()}


class MultiExitForImageClassification(MultiExitPreTrainedModel):
    """A timm backbone with auxiliary exits; its own head is the deepest exit.

    Args:
        config: What to build.
        backbone: A finished timm model for ``config.backbone``; ``None`` to build one with timm's initialisation.
    """

    def __init__(self, config: MultiExitConfig, backbone: nn.Module | None = None):
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
            backbone: All that ``timm.create_model`` takes, ``hf-hub:`` and ``local-dir:`` included.
            pretrained: Whether to fetch timm's weights.
            num_labels: Number of classes; ``None`` keeps timm's classifier and, if pretrained, its label names.
            config: Fields of :class:`MultiExitConfig`.

        Raises:
            ValueError: If ``exit_width`` would replace a pretrained classifier that was meant to be kept.
        """
        if "num_classes" in (config.get("backbone_kwargs") or {}):
            raise ValueError("Give the number of classes as num_labels, not in backbone_kwargs.")
        if pretrained and num_labels is None and config.get("exit_width") is not None:
            raise ValueError(
                "exit_width puts a new classifier behind the backbone, so the pretrained one would be lost. "
                "Give num_labels if that is meant, or leave exit_width at None."
            )
        backbone_kwargs = dict(config.pop("backbone_kwargs", None) or {})
        model = create_backbone(
            backbone,
            num_classes=num_labels,
            small_input_stem=config.get("small_input_stem", False),
            exit_width=config.get("exit_width"),
            pretrained=pretrained,
            **backbone_kwargs,
        )
        labels = {"num_labels": model.num_classes}
        if pretrained and num_labels is None and "id2label" not in config:
            labels = _label_names(model) or labels
        built = MultiExitConfig(**_describe(model, backbone, pretrained, backbone_kwargs), **(labels | config))
        return cls(built, backbone=model)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MultiExitOutput | tuple:
        """Answer with every exit.

        Args:
            pixel_values: ``(batch, channels, height, width)``.
            labels: Class indices ``(batch,)`` or probabilities ``(batch, classes)``; adds ``loss``.
            output_hidden_states: Whether to return the maps of all stages; always so in training.
            return_dict: ``False`` returns a tuple.
        """
        seen = _Collector()
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
        return output if return_dict is not False else output.to_tuple()

    @property
    def classifiers(self) -> list[nn.Module]:
        """What turns features into the deepest exit's logits: one linear module, or several that are averaged."""
        return _classifiers(self.backbone)

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

    def _stage_map(self, index: int, output: Any, image_size: tuple[int, int]) -> Tensor:
        return output if not self.anatomy.hooked else self.anatomy.stages[index].to_map(output, image_size)


def _describe(backbone: nn.Module, name: str, pretrained: bool, given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that rebuild the backbone, with the arguments that a Hub repository brought."""
    architecture, tag = backbone.pretrained_cfg["architecture"], backbone.pretrained_cfg.get("tag")
    recorded = {**getattr(backbone, "_model_args", {}), **given}
    kept = {key: value for key, value in recorded.items() if key not in REFUSED_BACKBONE_KWARGS}
    return {
        "backbone": f"{architecture}.{tag}" if pretrained and tag and ":" not in name else architecture,
        "backbone_kwargs": copy.deepcopy(kept),
    }


def _label_names(backbone: nn.Module) -> dict[str, Any] | None:
    """Return ImageNet's label names where timm knows that the weights answer with them."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    cfg = backbone.pretrained_cfg
    if cfg.get("label_names"):
        names = list(cfg["label_names"])
    elif subset := infer_imagenet_subset({**cfg, "num_classes": backbone.num_classes}):
        names = ImageNetInfo(subset).label_descriptions()
    else:
        return None
    id2label = dict(enumerate(names))
    return {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}
