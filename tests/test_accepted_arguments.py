"""Every argument of transformers' Trainer, TrainingArguments and PreTrainedConfig has its effect, or is refused.

Each is listed below: with the test of what this library does with it, as refused, or as transformers' own affair, with
what transformers does with it. An argument that a release adds fails here until somebody has looked at it.
"""

import inspect
import re
from pathlib import Path

import pytest
from transformers import PreTrainedConfig, Trainer, TrainingArguments

from hf_selfkd import MultiExitConfig, SelfDistillationTrainer
from hf_selfkd.training.refused_arguments import REFUSED
from tests.helpers.versions import TRANSFORMERS

TESTS = Path(__file__).parent
STOCK = "stock"

TRAINER = {
    "model": "training/test_settings.py::test_models_that_cannot_be_trained_are_refused",
    "args": "training/test_settings.py::test_the_arguments_of_the_caller_are_not_edited",
    "data_collator": f"{STOCK}: collates the samples that are checked and seeded",
    "train_dataset": "training/test_trainer.py::test_the_number_of_workers_changes_nothing",
    "eval_dataset": "training/test_trainer.py::test_data_sets_with_names_are_evaluated_each",
    "processing_class": "training/test_image_processing.py::test_a_checkpoint_uses_the_image_processor_of_its_run",
    "model_init": "training/test_hyper_parameters.py::test_the_best_run_is_the_most_accurate",
    "compute_loss_func": "training/test_label_losses.py::test_it_is_the_loss_of_every_label_term_and_of_no_other",
    "compute_metrics": "training/test_trainer.py::test_own_metrics_come_on_top_of_those_of_the_exits",
    "callbacks": f"{STOCK}: called beside those of this library",
    "optimizers": "training/test_settings.py::test_an_optimizer_that_lacks_parameters_is_refused",
    "optimizer_cls_and_kwargs": f"{STOCK}: built from the groups of get_decay_parameter_names",
    "preprocess_logits_for_metrics": "training/test_trainer.py::test_preprocessing_sees_the_logits_of_the_final_exit",
}
TESTED_ARGUMENTS = {
    "training/test_settings.py": (
        "ddp_find_unused_parameters ddp_broadcast_buffers logging_nan_inf_filter metric_for_best_model "
        "greater_is_better lr_scheduler_type seed"
    ),
    "training/test_sigterm.py": "enable_jit_checkpoint",
    "training/test_hub.py": "push_to_hub hub_token hub_model_id hub_always_push hub_revision",
    "training/test_checkpoints.py": "save_total_limit",
    "training/test_resume.py": "save_strategy save_steps",
    "training/test_private_hooks.py": "load_best_model_at_end eval_strategy eval_steps",
    "training/test_nonfinite.py": "max_grad_norm fp16",
    "training/test_attachment.py": "auto_find_batch_size",
    "training/test_recipe.py": "warmup_steps label_smoothing_factor",
    "training/test_trainer.py": (
        "gradient_accumulation_steps torch_compile torch_compile_backend bf16 remove_unused_columns "
        "dataloader_num_workers dataloader_persistent_workers eval_accumulation_steps eval_do_concat_batches "
        "batch_eval_metrics per_device_eval_batch_size per_device_train_batch_size"
    ),
    "training/test_callbacks.py": "num_train_epochs max_steps",
    "training/test_run_arguments.py": "report_to",
}
STOCK_ARGUMENTS = {
    "the optimizer that Trainer builds": (
        "learning_rate weight_decay lr_scheduler_kwargs optim optim_args adam_beta1 adam_beta2 adam_epsilon "
        "optim_target_modules"
    ),
    "precision and compilation by Accelerate": "tf32 torch_compile_mode",
    "the model's own dtype in evaluation, to which it casts images": "bf16_full_eval fp16_full_eval",
    "the model's _set_gradient_checkpointing": (
        "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs"
    ),
    "the loop around training_step": (
        "ignore_data_skip torch_empty_cache_steps full_determinism debug skip_memory_metrics"
    ),
    "when and where Trainer logs": (
        "logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica disable_tqdm"
    ),
    "read by the callbacks of trackers": (
        "run_name project trackio_space_id trackio_bucket_id trackio_static_space_id"
    ),
    "when Trainer evaluates, and what its loop hands to compute_metrics": (
        "eval_delay eval_on_start prediction_loss_only include_for_metrics"
    ),
    "gather_function, which the metrics of the exits use too": "eval_use_gather_object",
    "what Trainer writes and uploads": (
        "output_dir save_only_model save_on_each_node hub_private_repo hub_strategy "
        "restore_callback_states_from_checkpoint"
    ),
    "devices and processes, by Accelerate": (
        "use_cpu accelerator_config ddp_bucket_cap_mb ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config "
        "local_rank"
    ),
    "the DataLoader that Trainer builds": (
        "data_seed dataloader_drop_last dataloader_pin_memory dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order"
    ),
    "read by scripts, not by Trainer": "do_train do_eval do_predict resume_from_checkpoint",
}
CONFIGURATION = {
    "transformers_version": f"{STOCK}: written by save_pretrained",
    "architectures": f"{STOCK}: written by save_pretrained",
    "output_hidden_states": "models/test_modeling_base.py::test_fields_that_are_set_later_have_their_effect",
    "return_dict": "models/test_modeling_base.py::test_fields_that_are_set_later_have_their_effect",
    "dtype": "models/test_modeling_classification.py::",
    "chunk_size_feed_forward": "refused",
    "is_encoder_decoder": "refused",
    "id2label": "models/test_modeling_classification.py::",
    "label2id": "test_properties.py::",
    "problem_type": "training/test_settings.py::test_models_that_cannot_be_trained_are_refused",
}


def listed(groups):
    return {name: reason for reason, names in groups.items() for name in names.split()}


ARGUMENTS = listed(TESTED_ARGUMENTS) | listed(
    {f"{STOCK}: {reason}": names for reason, names in STOCK_ARGUMENTS.items()}
)
ARGUMENTS |= dict.fromkeys(REFUSED, "refused")
KINDS = {
    "Trainer.__init__": (Trainer.__init__, TRAINER),
    "TrainingArguments": (TrainingArguments, ARGUMENTS),
    "PreTrainedConfig": (PreTrainedConfig, CONFIGURATION),
}


@pytest.mark.skipif(TRANSFORMERS < (5, 24), reason="earlier versions lack some, and have others that are deprecated")
@pytest.mark.parametrize(("kind", "table"), KINDS.values(), ids=KINDS)
def test_every_argument_is_listed(kind, table):
    names = set(inspect.signature(kind).parameters) - {"self"}
    new, gone = sorted(names - table.keys()), sorted(table.keys() - names)
    assert not new, f"{new} are new. Give them an effect and name its test, refuse them, or say why they are stock."
    assert not gone, f"{gone} are no more. Remove them here, and from REFUSED."


def test_no_argument_is_listed_twice():
    names = " ".join([*TESTED_ARGUMENTS.values(), *STOCK_ARGUMENTS.values(), *REFUSED]).split()
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("table", [TRAINER, ARGUMENTS, CONFIGURATION], ids=KINDS)
def test_the_tests_exist_and_use_the_arguments(table):
    for name, reason in table.items():
        file, _, test = reason.partition("::")
        if file.endswith(".py"):
            code = (TESTS / file).read_text()
            assert f"def {test}" in code, reason
            assert re.search(rf"\b{name}\b", code), f"{file} does not use {name}"


OTHER_VALUES = {
    "average_tokens_across_devices": False,
    "deepspeed": "zero2.json",
    "include_num_input_tokens_seen": "non_padding",
    "label_names": ["targets"],
    "length_column_name": "size",
    "liger_kernel_config": {"rope": True},
    "neftune_noise_alpha": 5.0,
    "parallelism_config": object(),
    "train_sampling_strategy": "group_by_length",
    "use_cache": True,
    "use_liger_kernel": True,
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_could_have_no_effect_are_refused_by_name(build, name):
    args = TrainingArguments(use_cpu=True)
    setattr(args, name, OTHER_VALUES[name])
    with pytest.raises(ValueError, match=f"TrainingArguments has {name}=.*, which has no effect here. .*\\."):
        SelfDistillationTrainer(build(), args)


@pytest.mark.parametrize(("name", "value"), [("chunk_size_feed_forward", 2), ("is_encoder_decoder", True)])
def test_fields_that_could_have_no_effect_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be (0|False), but got {value}: it is for language models"):
        MultiExitConfig(**{name: value})
