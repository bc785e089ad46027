"""Training arguments that could have no effect on a multi-exit vision model: refused, not ignored."""

from transformers import TrainingArguments

# Each with the values that are accepted, and what to do instead.
REFUSED = {
    "average_tokens_across_devices": ((True,), "Losses are means over the images of all processes, always."),
    "deepspeed": (
        (None,),
        "Use DDP or FSDP2: only they are known to save and resume what a method adds to the model.",
    ),
    "include_num_input_tokens_seen": (
        ("no", "all", False, True),
        "Images have no padding; 'all' counts their values.",
    ),
    "label_names": ((None, ["labels"]), "Name the labels of a batch 'labels', or let data_collator do so."),
    "length_column_name": (("length",), "Images have no length to group them by."),
    "liger_kernel_config": ((None,), "Liger kernels are for language models."),
    "neftune_noise_alpha": ((None,), "Images have no token embeddings. Add noise to images in their transform."),
    "parallelism_config": ((None,), "A timm backbone has no plan to split layers or sequences. Use DDP or FSDP2."),
    "train_sampling_strategy": (("random", "sequential"), "Images have no length to group them by."),
    "use_cache": ((False,), "There are no keys and values to cache."),
    "use_liger_kernel": ((False,), "Liger kernels are for language models."),
}


def check_refused(args: TrainingArguments) -> None:
    """Raise ValueError if an argument is set that could have no effect."""
    for name, (accepted, advice) in REFUSED.items():
        value = getattr(args, name)
        if value not in accepted:
            raise ValueError(f"TrainingArguments has {name}={value!r}, which has no effect here. {advice}")
