"""What all multi-exit models share: building, initialising, saving, loading and freezing."""

from collections.abc import Collection
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from .backbone import attach_hooks, default_exits, measure
from .configuration import MultiExitConfig
from .creation import create_backbone
from .early_exit import resolve_policy
from .records import data_config

# What says where the files of a checkpoint are, among the arguments of from_pretrained.
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class MultiExitPreTrainedModel(PreTrainedModel):
    """What classification and segmentation share: building, initialising, saving, loading and freezing."""

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
        config.check()
        self.backbone = backbone if backbone is not None else self._create_backbone(config.num_labels)
        self.anatomy = measure(lambda: self._create_backbone(self.backbone.num_classes))
        attach_hooks(self.backbone, self.anatomy)
        self._backbone_frozen = False
        self.scaffold: nn.Module | None = None
        self._shrinks: bool | None = None  # unknown until the first batch leaves early
        if config.pretrained_cfg is None:
            config.pretrained_cfg = data_config(self.backbone, config.small_input_stem)
        self.exit_stages = self._choose_exits()
        if config.early_exit or config.exit_policy is not None:
            resolve_policy(None, config.exit_policy, self.num_exits)

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
        self._shrinks = None
        if self._backbone_frozen:
            self.backbone.eval()
        return self

    def save_pretrained(self, save_directory, *args, state_dict: dict[str, Tensor] | None = None, **kwargs) -> None:
        """Save what ships, in safetensors: never the scaffold. See ``PreTrainedModel.save_pretrained``."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        shipped = {name: tensor for name, tensor in state_dict.items() if not name.startswith("scaffold.")}
        super().save_pretrained(save_directory, *args, state_dict=shipped, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """Load a checkpoint, whole or not at all. See ``PreTrainedModel.from_pretrained``.

        Args:
            pretrained_model_name_or_path: A folder or a repository of the Hub.
            args: As there.
            ignore_mismatched_sizes: Whether weights of another shape start anew, such as those of other classes.
            output_loading_info: As there.
            kwargs: As there, fields of the configuration included.

        Raises:
            ValueError: If the weights cannot be read, or are those of another network than the configuration's.
        """
        source = pretrained_model_name_or_path
        try:
            model, info = super().from_pretrained(
                source, *args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(
                f"The weights in {source} cannot be read: {error}. The file is cut off or damaged; get it again."
            ) from error
        missing, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        if missing or extra:
            raise ValueError(
                f"The weights in {source} are of another network than its configuration: they lack {shorten(missing)} "
                f"and hold {shorten(extra)} beside it. Load them with the configuration they were saved with."
            )
        if info["mismatched_keys"] and not ignore_mismatched_sizes:
            name, stored, wanted = min(info["mismatched_keys"])
            raise ValueError(
                f"The weights in {source} have other shapes than the model: {name} {tuple(stored)} instead of "
                f"{tuple(wanted)} ({len(info['mismatched_keys'])} names in all). With ignore_mismatched_sizes=True "
                "they start anew."
            )
        if source is not None and kwargs.get("state_dict") is None:
            model.check_exits(source, **{name: kwargs[name] for name in _WHERE if name in kwargs})
        return (model, info) if output_loading_info else model

    def check_exits(self, source, **where: Any) -> None:
        """Raise ValueError if the exits of a checkpoint sit at other stages, which shapes alone do not tell.

        Args:
            source: A folder or a repository of the Hub.
            where: As ``from_pretrained`` takes it.
        """
        fields, _ = self.config_class.get_config_dict(source, **where)
        exits = fields.get("exits")
        stages = default_exits(self.anatomy.stages) if exits is None else list(exits)
        if stages != self.exit_stages:
            raise ValueError(
                f"The exits of {source} sit at stages {stages}, those of the model at {self.exit_stages}. Weights do "
                "not fit at other stages, whatever their shapes: load it with the exits it was saved with."
            )


def shorten(names: Collection[str]) -> str:
    """List the first few of many names, and count them."""
    return f"{', '.join(list(names)[:3]) or 'nothing'} ({len(names)} names in all)"
