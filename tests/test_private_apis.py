"""Names of other packages that are no documented API and that this one uses, each with the reason.

A failure reports the reason, which says what has to be replaced or can be removed.
"""

import ast
import importlib
import inspect

import accelerate.data_loader
import accelerate.utils
import huggingface_hub.utils
import pytest
import timm
import timm.layers
import timm.models
import timm.utils
import torch
import transformers.modeling_utils
import transformers.models.auto.modeling_auto
import transformers.trainer
import transformers.trainer_callback
import transformers.trainer_pt_utils
import transformers.trainer_utils
import transformers.utils.hub
from torch.utils import _pytree
from transformers import ImageClassificationPipeline, PreTrainedModel, ProgressCallback, Trainer

from hf_selfkd.training.loss_sums import PRIVATE_FIELDS
from hf_selfkd.training.trainer import PRIVATE_HOOKS
from tests.helpers.layering import PACKAGE
from tests.helpers.private_hooks import HOOK_PARAMETERS

# Owner, name, parameters that are given by position or by name (None for an attribute), and why it is used.
MODELS = [
    (
        PreTrainedModel,
        "_finalize_model_loading",
        ["model", "load_config", "loading_info"],
        "no public method is called between reading a checkpoint and allocating what it lacks: check_new_values",
    ),
    (
        transformers.modeling_utils.LoadStateDictInfo,
        "missing_and_mismatched",
        ["self"],
        "given to _finalize_model_loading: what will be allocated",
    ),
    (PreTrainedModel, "_init_weights", ["self", "module"], "documented for subclasses: initialises missing tensors"),
    (
        PreTrainedModel,
        "_set_gradient_checkpointing",
        ["self", "enable", "gradient_checkpointing_func"],
        "timm has a switch of its own, and transformers' looks for an attribute of its own layers",
    ),
    (PreTrainedModel, "_auto_class", None, "set by register_for_auto_class: whether code is saved with the weights"),
    (PreTrainedModel, "_tied_weights_keys", None, "documented for subclasses: parameters that modules share (coat)"),
    (
        PreTrainedModel,
        "_get_files_timestamps",
        ["self", "working_dir"],
        "save_pretrained(push_to_hub=True) uploads before the image processor and the card are written: upload",
    ),
    (
        PreTrainedModel,
        "_upload_modified_files",
        ["self", "working_dir", "repo_id", "files_timestamps", "commit_message", "token", "create_pr", "revision"],
        "save_pretrained(push_to_hub=True) uploads before the image processor and the card are written: upload",
    ),
    (
        transformers.utils.hub,
        "cached_files",
        ["_raise_exceptions_for_missing_entries"],
        "the only way to ask whether a file exists in a folder or repository alike: check_weights",
    ),
    (
        transformers.utils.hub,
        "cached_file",
        ["path_or_repo_id", "filename", "kwargs"],
        "cached_files for one file: check_weights",
    ),
    (
        transformers.utils.hub,
        "create_and_tag_model_card",
        ["repo_id", "tags", "token"],
        "the short card that push_to_hub writes for a model without one: upload",
    ),
    (
        ImageClassificationPipeline,
        "_sanitize_parameters",
        ["self", "top_k", "function_to_apply", "timeout"],
        "documented for subclasses: EarlyExitPipeline takes a policy and a target cost",
    ),
    (ImageClassificationPipeline, "_forward", ["self", "model_inputs"], "documented for subclasses: likewise"),
    (
        transformers.models.auto.modeling_auto,
        "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
        None,
        "pipeline('image-segmentation') checks only this table, which does not include registered models",
    ),
    *(
        (
            transformers.utils,
            name,
            None,
            "names of files in a checkpoint, which transformers exports without documents",
        )
        for name in ("CONFIG_NAME", "IMAGE_PROCESSOR_NAME", "SAFE_WEIGHTS_INDEX_NAME", "SAFE_WEIGHTS_NAME")
    ),
    (_pytree, "tree_map", ["func", "tree", "rests"], "torch has no public pytree; walks nested outputs of stages"),
    (_pytree, "tree_map_only", ["type_or_types_or_pred", "func", "tree"], "torch has no public pytree"),
    (_pytree, "tree_leaves", ["tree"], "torch has no public pytree"),
    (timm.models, "parse_model_name", ["model_name"], "reads a prefix such as hf-hub: as timm.create_model does"),
    (timm.models, "get_pretrained_cfg", ["model_name"], "the data configuration of a name, without building a model"),
    (timm.models, "group_parameters", ["module", "group_matcher", "reverse"], "learning rates per layer, as in timm"),
    (timm.models, "load_state_dict", ["checkpoint_path"], "reads the files of weights that timm reads"),
    (timm.models, "get_arch_pretrained_cfgs", ["model_name"], "the tags of an architecture, for the error message"),
    (
        timm.models,
        "save_for_hf",
        ["model", "save_directory", "model_config", "model_args", "safe_serialization"],
        "writes a timm checkpoint that timm reads: save_timm",
    ),
    (timm.layers, "ClassifierHead", None, "the classifiers that hold their pooling: without_pooling"),
    (timm.layers, "to_2tuple", ["x"], "image sizes as timm's own models read them"),
    (timm.utils, "distribute_bn", ["model", "world_size", "reduce"], "equal batch-norm statistics on all processes"),
    (timm.utils, "ModelEmaV3", ["self", "model", "decay"], "the moving average of the weights"),
    (huggingface_hub.utils, "validate_repo_id", ["repo_id"], "whether a name can be a repository, without asking"),
]
# The hooks have the parameters that the overrides pass on; test_private_hooks compares both and calls all of them.
TRAINING = [
    *((Trainer, name, parameters, PRIVATE_HOOKS.get(name)) for name, parameters in HOOK_PARAMETERS.items()),
    (
        Trainer,
        "set_initial_training_values",
        ["self", "args", "dataloader"],
        "turns epochs of a stream into steps, which depend on all processes",
    ),
    (Trainer, "create_scheduler", ["self", "num_training_steps", "optimizer"], "milestones of the learning rate"),
    (Trainer, "save_model", ["self", "output_dir", "_internal_call"], "writes the card, except into checkpoints"),
    (Trainer, "log", ["self", "logs", "start_time"], "adds the terms of the loss"),
    (Trainer, "call_model_init", ["self", "trial"], "attaches the method to each model of a search"),
    (Trainer, "get_total_train_batch_size", ["self", "args"], "samples of a step on all processes"),
    (Trainer, "init_hf_repo", ["self", "token"], "creates the repository before the branch that is pushed to"),
    (
        transformers.utils.PushInProgress,
        "wait_until_done",
        ["self"],
        "failed uploads in the background are reported nowhere else: ReportPushes reads trainer.push_in_progress.jobs",
    ),
    (transformers.trainer, "TRAINER_STATE_NAME", None, "a checkpoint's state names its folder, which is renamed"),
    (
        transformers.trainer_pt_utils,
        "EvalLoopContainer",
        None,
        "gathers what the metrics of the exits need as the evaluation loop gathers logits",
    ),
    (transformers.trainer_utils, "has_length", ["dataset"], "streams have none"),
    (
        transformers.trainer_utils,
        "sort_checkpoints",
        ["output_dir", "best_model_checkpoint"],
        "which checkpoints save_total_limit keeps, as Trainer decides it",
    ),
    (
        transformers.trainer_callback,
        "ExportableState",
        None,
        "documented, but exported nowhere else: the position in a stream is part of a checkpoint",
    ),
    (ProgressCallback, "on_prediction_step", ["self", "args", "state", "control", "eval_dataloader"], "the bar"),
    (accelerate.utils, "is_compiled_module", ["module"], "torch has no public question for a compiled module"),
    (accelerate.data_loader, "DataLoaderShard", None, "its base_dataloader is the loader whose batches get indices"),
]
# Documented, but not exported by the package itself.
DOCUMENTED = {
    "accelerate.utils.gather_object",
    "datasets.distributed.split_dataset_by_node",
    "huggingface_hub.errors.HFValidationError",
    "timm.data.ImageNetInfo",
    "timm.data.infer_imagenet_subset",
    "transformers.image_utils.PILImageResampling",
    "transformers.modeling_outputs.BaseModelOutputWithPooling",
    "transformers.trainer_utils.EvalLoopOutput",
    "transformers.trainer_utils.EvalPrediction",
    "transformers.trainer_utils.PredictionOutput",
    "transformers.trainer_utils.SaveStrategy",
    "transformers.trainer_utils.TrainOutput",
    "transformers.utils.ModelOutput",
    "transformers.utils.logging",
}


@pytest.mark.parametrize(
    ("owner", "name", "parameters", "reason"),
    MODELS + TRAINING,
    ids=[f"{owner.__name__}.{name}" for owner, name, *_ in MODELS + TRAINING],
)
def test_a_name_is_still_there(owner, name, parameters, reason):
    assert hasattr(owner, name), f"{name} is gone. It was used because: {reason}."
    if parameters is not None:
        found = set(inspect.signature(getattr(owner, name)).parameters) | {"self"}
        assert found >= set(parameters), f"{name} has changed. It is used because: {reason}."


def imported_names():
    """Yield the names that the package imports from modules of other packages, as ``package.module.name``."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_import_of_an_undocumented_name_is_listed():
    packages = ("accelerate", "datasets", "huggingface_hub", "timm", "transformers", "torch.utils._pytree")
    listed = [getattr(owner, name) for owner, name, *_ in MODELS + TRAINING]
    for imported in set(imported_names()) - DOCUMENTED:
        module, _, name = imported.rpartition(".")
        if module.startswith(packages) and ("." in module):
            value = getattr(importlib.import_module(module), name)
            assert any(value is known for known in listed), f"{imported} is in none of the tables of this module"


def test_every_private_attribute_that_is_used_is_listed():
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    own = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"}
    used = {node.attr for node in attributes if node.attr.startswith("_") and not node.attr.startswith("__")}
    used |= {node.arg for node in nodes if isinstance(node, ast.keyword) and (node.arg or "").startswith("_")}
    listed = (
        {name for _, name, *_ in MODELS + TRAINING}
        | PRIVATE_FIELDS.keys()
        | PRIVATE_HOOKS.keys()
        | {
            "_forward_pre_hooks",  # torch's public way to register a hook returns no way to ask whether it is there
            "_initial_global_step",  # see training/versions.py
            "_internal_call",  # an argument of Trainer.save_model, above
            "_is_hf_initialized",  # tested below
            "_raise_exceptions_for_missing_entries",  # an argument of cached_files, above
            "_replace",  # a documented method of named tuples
        }
    )
    assert used - own - listed == set()


def test_timm_still_records_the_arguments_of_a_model():
    """Read by input_shape and describe: timm offers no other way to what a Hub repository or a caller gave."""
    assert timm.create_model("test_vit", img_size=64)._model_args["img_size"] == 64


def test_timm_still_names_the_modules_of_stages_and_fills_tables():
    """Documented for feature extraction only: hooks sit at these modules, and loading fills these tables."""
    model = timm.create_model("test_vit")
    assert all(isinstance(model.get_submodule(info["module"]), torch.nn.Module) for info in model.feature_info)
    assert callable(model.set_grad_checkpointing)
    assert callable(timm.models.swin_transformer.WindowAttention.init_non_persistent_buffers)


def test_transformers_still_leaves_modules_alone_that_are_marked_as_initialised(build):
    """Set by post_init, because transformers has no public switch that keeps timm's initialisation."""
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_checks_happen_between_reading_a_checkpoint_and_allocating_what_it_lacks(build, tmp_path, monkeypatch):
    build().save_pretrained(tmp_path)
    model_class, seen = type(build()), []

    def finalize(model, load_config, loading_info):
        seen.extend(tensor.is_meta for name, tensor in model.named_parameters() if name == "backbone.fc.weight")
        return loading_info

    monkeypatch.setattr(model_class, "_finalize_model_loading", staticmethod(finalize))
    model_class.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert seen == [True]
