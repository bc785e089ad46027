"""The private names of other packages that this one depends on, each with the reason, which a failure reports."""

import inspect

import pytest
import timm
import torch
import transformers.utils.hub
from torch.utils import _pytree
from transformers import ImageClassificationPipeline, PreTrainedModel

# Owner, name, parameters that are given by position or by name (None for an attribute), and why it is used.
MODELS = [
    (
        PreTrainedModel,
        "_finalize_model_loading",
        ["model", "load_config", "loading_info"],
        "no public method is called between reading a checkpoint and allocating what it lacks: check_new_values",
    ),
    (PreTrainedModel, "_init_weights", ["self", "module"], "documented for subclasses: initialises missing tensors"),
    (
        PreTrainedModel,
        "_set_gradient_checkpointing",
        ["self", "enable", "gradient_checkpointing_func"],
        "timm has a switch of its own, and transformers' looks for an attribute of its own layers",
    ),
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
    (_pytree, "tree_map", ["func", "tree", "rests"], "torch has no public pytree; walks nested outputs of stages"),
    (_pytree, "tree_map_only", ["type_or_types_or_pred", "func", "tree"], "torch has no public pytree"),
    (_pytree, "tree_leaves", ["tree"], "torch has no public pytree"),
]


@pytest.mark.parametrize(("owner", "name", "parameters", "reason"), MODELS, ids=lambda value: value)
def test_a_private_name_is_still_there(owner, name, parameters, reason):
    assert hasattr(owner, name), f"{name} is gone. It was used because: {reason}."
    if parameters is not None:
        found = set(inspect.signature(getattr(owner, name)).parameters)
        assert found >= set(parameters), f"{name} has changed. It is used because: {reason}."


def test_timm_still_records_the_arguments_of_a_model():
    """Read by input_shape and describe: timm offers no other way to what a Hub repository or a caller gave."""
    assert timm.create_model("test_vit", img_size=64)._model_args["img_size"] == 64


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
