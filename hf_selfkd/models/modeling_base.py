"""Base class of the multi-exit models: building, initialising, saving, loading and freezing."""

import os
from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from .checkpoint_files import LOCATION_ARGUMENTS, check_loaded, check_weights, save_image_processor, upload
from .configuration import MultiExitConfig
from .dry_run import input_shape, measure
from .exit_policy import resolve_policy
from .freezing import BackboneFreezing
from .hooks import attach_hooks
from .layers import GroupedLayers
from .outputs import MultiExitOutput, MultiLabelOutput
from .rebuild import check_rebuilds
from .stages import Anatomy, choose_stages
from .timm_factory import create_backbone, create_recorded, data_config
from .timm_instance import record_instance
from .untrusted import check_new_values, limited

# The arguments of save_pretrained that are about the upload.
_UPLOAD_ARGUMENTS = ("commit_message", "create_pr", "private", "repo_id", "revision", "token")


class MultiExitPreTrainedModel(BackboneFreezing, GroupedLayers, PreTrainedModel):
    """Base class of the classification and the segmentation model: building, initialising, saving and loading.

    Args:
        config: Configuration of the model.
        backbone: A finished timm model for ``config.backbone``; ``None`` to build one with timm's initialisation.
        anatomy: The structure of the backbone, if it was measured before; ``None`` to measure it.
    """

    config_class = MultiExitConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # timm's attention calls it by itself, as transformers' TimmWrapper notes
    accepts_loss_kwargs = False
    model_tags = ["hf_selfkd", "timm", "image-classification", "multi-exit", "self-distillation", "early-exit"]
    task = "image-classification"
    auto_classes: dict[str, str] = {}  # the classes that load a checkpoint without this library, by auto class
    # Set by Method.attach. Exits that read detached feature maps leave the training of the backbone unchanged.
    detach_exits = False
    # Likewise: whether feature maps are returned in training. Otherwise only the scaffold reads them.
    returns_maps = True

    def __init__(self, config: MultiExitConfig, backbone: nn.Module | None = None, anatomy: Anatomy | None = None):
        super().__init__(config)
        config.check()
        self.model_tags = list(self.model_tags)  # transformers adds to them in place
        self.backbone = backbone if backbone is not None else self._create_backbone(config.num_labels)
        self.anatomy = anatomy if anatomy is not None else measure(self.backbone)
        attach_hooks(self.backbone, [stage.module for stage in self.anatomy.stages])
        self.num_channels = input_shape(self.backbone)[0]
        self.scaffold: nn.Module | None = None
        self.shrinks_batch: bool | None = None  # unknown until the first batch exits early
        config.pretrained_cfg = data_config(self.backbone, config.small_input_stem) | (config.pretrained_cfg or {})
        self.exit_stages = self._choose_exit_stages()
        if config.early_exit or config.exit_policy is not None:
            resolve_policy(None, config.exit_policy, self.num_exits, multi_label=config.is_multi_label)

    @classmethod
    def from_backbone(
        cls, backbone: str | nn.Module, *, pretrained: bool = False, num_labels: int | None = None, **config
    ):
        """Build a model on a timm backbone, pretrained or not.

        Args:
            backbone: Any name that ``timm.create_model`` takes, ``hf-hub:`` and ``local-dir:`` included, a file of
                weights as ``backbone_kwargs={"checkpoint_path": ...}``; or a model that it built, which is copied.
            pretrained: Whether to load timm's weights, for a name.
            num_labels: Number of classes; ``None`` keeps timm's classifier and, of weights, its label names.
            config: Fields of :class:`MultiExitConfig`.

        Raises:
            ValueError: If ``exit_width`` would replace the pretrained classifier that ``num_labels=None`` keeps, or a
                model is not the one that its name and arguments build.
            TypeError: If ``backbone`` is neither a name nor a timm model.
        """
        is_name = isinstance(backbone, str)
        if pretrained and not is_name:
            raise ValueError("pretrained loads timm's weights by name, but the timm model has weights. Do not set it.")
        if (pretrained or not is_name) and num_labels is None and config.get("exit_width") is not None:
            raise ValueError(
                "exit_width puts a new classifier on the backbone, so the pretrained one would be lost. "
                "Pass num_labels if that is intended, or leave exit_width at None."
            )
        if is_name:
            built, model = create_recorded(backbone, pretrained, num_labels, config)
            return cls(built, backbone=model)
        built, model = record_instance(backbone, num_labels, config)
        return cls(built, backbone=model).to(next(backbone.parameters()))

    def _create_backbone(self, num_classes: int) -> nn.Module:
        with limited(self.config):
            return create_backbone(
                self.config.backbone,
                num_classes=num_classes,
                small_input_stem=self.config.small_input_stem,
                exit_width=self.config.exit_width,
                **self.config.backbone_kwargs,
            )

    def _choose_exit_stages(self) -> list[int]:
        stages = self.anatomy.stages
        if self.config.exits is None:
            return choose_stages(stages, include_last=False)
        for stage in self.config.exits:
            if not 0 <= stage < len(stages):
                raise ValueError(
                    f"{self.config.backbone} has {len(stages)} stages (0 to {len(stages) - 1}), "
                    f"but exits asks for stage {stage}."
                )
        return list(self.config.exits)

    def _as_configured(self, output_hidden_states: bool | None, return_dict: bool | None) -> tuple[bool, bool]:
        """Return two arguments of ``forward``, those that are ``None`` as the configuration has them."""
        return (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            self.config.return_dict if return_dict is None else return_dict,
        )

    def _finish(
        self,
        pixel_values: Tensor,
        labels: Tensor | None,
        output_hidden_states: bool | None,
        return_dict: bool | None,
        *,
        exit_logits: tuple[Tensor, ...],
        **found: Any,
    ) -> MultiExitOutput | tuple:
        """Turn the outputs of all exits into the output of ``forward``: final logits, loss and scaffold.

        The first four arguments are those of ``forward``; ``found`` are further fields of :class:`MultiExitOutput`.
        """
        logits = exit_logits[-1]
        if self.config.ensemble and not self.training:
            logits = torch.stack(exit_logits).mean(dim=0)
        output_class = MultiLabelOutput if self.config.is_multi_label else MultiExitOutput
        output = output_class(
            loss=None if labels is None else output_class.label_loss(logits, labels),
            logits=logits,
            exit_logits=exit_logits,
            **found,
        )
        if self.training and self.scaffold is not None:
            output.scaffold = self.scaffold(pixel_values, output)
        if not (self.returns_maps or output_hidden_states):
            output = replace(output, exit_maps=None, stage_outputs=None)
        return output if return_dict is not False else output.to_tuple()

    def post_init(self):
        """Finish the construction and keep timm's initialisation, which transformers would replace by its own."""
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
        # transformers calls this for tensors that a checkpoint does not hold: buffers that are not saved, and heads
        # for another number of classes. All others keep their values, see post_init.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
        elif getattr(getattr(module, "running_mean", None), "_is_hf_initialized", False):
            module.num_batches_tracked.zero_()  # the checkpoint lacks only this, see is_optional
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs) -> None:
        try:
            self.backbone.set_grad_checkpointing(enable)
        except AssertionError as error:
            raise ValueError(
                f"timm's {type(self.backbone).__name__} has no gradient checkpointing ({error}). Train without it."
            ) from error

    def get_input_embeddings(self):
        """Images have no token embeddings."""
        return None

    @property
    def num_exits(self) -> int:
        """Number of exits, the final exit included."""
        return len(self.exit_stages) + 1

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        use_safetensors: bool | None = None,
        **kwargs,
    ):
        """Load a complete checkpoint, from safetensors only. See ``PreTrainedModel.from_pretrained``.

        Args:
            pretrained_model_name_or_path: A folder or a repository of the Hub.
            args: See there.
            ignore_mismatched_sizes: Whether weights of another shape, such as those for other classes, are
                newly initialised.
            output_loading_info: See there.
            use_safetensors: ``False`` is rejected.
            kwargs: See there; fields of the configuration are accepted too.

        Raises:
            OSError: If there is no such checkpoint, or its weights are not in safetensors.
            ValueError: If the weights cannot be read or do not match the configuration, or if the configuration
                describes a model far larger than the checkpoint.
        """
        if use_safetensors is False:
            raise ValueError("Weights are read from safetensors only. Do not pass use_safetensors.")
        source = pretrained_model_name_or_path
        if source is not None:
            check_weights(source, kwargs)
        try:
            model, info = super().from_pretrained(
                source,
                *args,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                use_safetensors=True,
                **kwargs,
            )
        except SafetensorError as error:
            raise ValueError(
                f"The weights in {source} cannot be read: {error}. The file is truncated or corrupt."
            ) from error
        check_loaded(source, info, ignore_mismatched_sizes)
        if source is not None and kwargs.get("state_dict") is None:
            model.check_exits(source, **{name: kwargs[name] for name in LOCATION_ARGUMENTS if name in kwargs})
        return (model, info) if output_loading_info else model

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        # Private, because no public method is called between reading a checkpoint and allocating what it lacks.
        tables = {name for name, _ in model.named_non_persistent_buffers()}
        check_new_values(model, loading_info.missing_and_mismatched() | tables)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Save the inference weights in safetensors, without the scaffold. See ``PreTrainedModel.save_pretrained``.

        With ``push_to_hub`` the folder is complete before the upload starts. ``repo_id``, ``private``, ``token``,
        ``revision``, ``create_pr`` and ``commit_message`` are those of :meth:`push_to_hub`.
        """
        target = {name: kwargs.pop(name) for name in _UPLOAD_ARGUMENTS if name in kwargs}
        before = self._get_files_timestamps(save_directory) if os.path.isdir(save_directory) else {}
        state_dict = self.state_dict() if state_dict is None else state_dict
        weights = {name: tensor for name, tensor in state_dict.items() if not name.startswith("scaffold.")}
        if is_main_process and not getattr(self, "_hf_peft_config_loaded", False):
            check_rebuilds(self, weights)
        if self._auto_class is not None:  # transformers adds the class that is saved and no other
            self.config.auto_map = self.auto_classes | (getattr(self.config, "auto_map", None) or {})
        super().save_pretrained(save_directory, is_main_process, weights, **kwargs)
        if is_main_process and os.path.isdir(save_directory):
            self._save_image_processor(save_directory)
            if push_to_hub:
                upload(self, save_directory, before, **target)

    def _save_image_processor(self, folder: str | os.PathLike) -> None:
        save_image_processor(self.config, folder)

    def check_exits(self, source, **location: Any) -> None:
        """Check that the exits of a checkpoint sit at the stages of this model's, which shapes alone do not show.

        Args:
            source: A folder or a repository of the Hub.
            location: Arguments of ``from_pretrained`` that say where its files are.

        Raises:
            ValueError: If they sit at other stages.
        """
        fields, _ = self.config_class.get_config_dict(source, **location)
        stored = fields.get("exits")
        stored = choose_stages(self.anatomy.stages, include_last=False) if stored is None else list(stored)
        if stored != self.exit_stages:
            raise ValueError(
                f"The exits of {source} sit at stages {stored}, those of the model at {self.exit_stages}. Weights of "
                "exits at other stages do not fit, whatever their shapes: load it with the exits it was saved with."
            )
