"""What all multi-exit models share: building, initialising, saving, loading and freezing."""

import json
import os
from collections.abc import Collection
from typing import Any

import torch
from huggingface_hub import create_repo
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME
from transformers.utils.hub import create_and_tag_model_card

from .configuration import MultiExitConfig
from .dry_run import measure
from .exit_policy import resolve_policy
from .hooks import attach_hooks
from .stages import default_exits
from .timm_factory import create_backbone, data_config
from .untrusted import check_new_values, check_weights, limited
from .uploads import explained_upload

# What of the arguments of save_pretrained is about the upload.
_UPLOAD_ARGUMENTS = ("commit_message", "create_pr", "private", "repo_id", "revision", "token")
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
    model_tags = ["hf_selfkd", "timm", "image-classification", "multi-exit", "self-distillation", "early-exit"]
    task = "image-classification"

    # Set by the trainer, or in your own loop: exits read detached maps, so that the backbone learns as without them.
    detach_exits = False
    # Likewise: maps are part of the answer in training. Without it only the scaffold sees them.
    returns_maps = True

    def __init__(self, config: MultiExitConfig, backbone: nn.Module | None = None):
        super().__init__(config)
        config.check()
        self.model_tags = list(self.model_tags)  # transformers adds to them in place
        self.backbone = backbone if backbone is not None else self._create_backbone(config.num_labels)
        self.anatomy = measure(lambda: self._create_backbone(self.backbone.num_classes))
        attach_hooks(self.backbone, self.anatomy)
        self._backbone_frozen = False
        self.scaffold: nn.Module | None = None
        self._shrinks: bool | None = None  # unknown until the first batch leaves early
        config.pretrained_cfg = data_config(self.backbone, config.small_input_stem) | (config.pretrained_cfg or {})
        self.exit_stages = self._choose_exits()
        if config.early_exit or config.exit_policy is not None:
            resolve_policy(None, config.exit_policy, self.num_exits)

    def _create_backbone(self, num_classes: int) -> nn.Module:
        with limited(self.config):
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
        """Load a checkpoint, from safetensors only, whole or not at all. See ``PreTrainedModel.from_pretrained``.

        Args:
            pretrained_model_name_or_path: A folder or a repository of the Hub.
            args: As there.
            ignore_mismatched_sizes: Whether weights of another shape start anew, such as those of other classes.
            output_loading_info: As there.
            use_safetensors: ``False`` is refused.
            kwargs: As there, fields of the configuration included.

        Raises:
            OSError: If there is no such checkpoint, or its weights are not in safetensors.
            ValueError: If the weights cannot be read, or are those of another network than the configuration's; or if
                the configuration asks for far more than the checkpoint holds.
        """
        if use_safetensors is False:
            raise ValueError("Weights are read from safetensors only. Leave out use_safetensors.")
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

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        tables = {name for name, _ in model.named_non_persistent_buffers()}
        check_new_values(model, loading_info.missing_and_mismatched() | tables)  # before they are made
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Save what ships, in safetensors: never the scaffold. See ``PreTrainedModel.save_pretrained``.

        With ``push_to_hub`` the folder is complete before anything is sent. ``repo_id``, ``private``, ``token``,
        ``revision``, ``create_pr`` and ``commit_message`` say how, as in :meth:`push_to_hub`.

        Raises:
            OSError: If the upload failed.
        """
        target = {name: kwargs.pop(name) for name in _UPLOAD_ARGUMENTS if name in kwargs}
        before = self._get_files_timestamps(save_directory) if os.path.isdir(save_directory) else {}
        state_dict = self.state_dict() if state_dict is None else state_dict
        shipped = {name: tensor for name, tensor in state_dict.items() if not name.startswith("scaffold.")}
        super().save_pretrained(save_directory, is_main_process, shipped, **kwargs)
        if is_main_process and os.path.isdir(save_directory):
            self._save_image_processor(save_directory)
            if push_to_hub:
                self._upload(save_directory, before, **target)

    def _save_image_processor(self, folder: str | os.PathLike) -> None:
        """Write preprocessor_config.json, for tools that do not look into config.json."""
        names = ("image_processor_type", "pretrained_cfg")
        with open(os.path.join(folder, IMAGE_PROCESSOR_NAME), "w", encoding="utf-8") as file:
            json.dump({name: getattr(self.config, name) for name in names}, file, indent=2)
            file.write("\n")

    def _upload(
        self,
        folder: str | os.PathLike,
        before: dict[str, float],
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        **kwargs,
    ) -> None:
        """Upload what changed in a folder since ``before``, and its card: the folder's own, or a short one."""
        repo_id = os.path.basename(os.path.abspath(folder)) if repo_id is None else repo_id
        with explained_upload(repo_id, f"{folder} is complete."):
            repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
            card = os.path.join(folder, "README.md")
            before.pop("README.md", None)
            if not os.path.isfile(card):
                create_and_tag_model_card(repo_id, self.model_tags, token=token).save(card)
            self._upload_modified_files(folder, repo_id, before, token=token, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Upload all that loading needs, this library not included. See ``PreTrainedModel.push_to_hub``.

        Raises:
            OSError: If the upload failed.
        """
        with explained_upload(repo_id, "The model is as it was."):
            return super().push_to_hub(repo_id, **kwargs)

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
