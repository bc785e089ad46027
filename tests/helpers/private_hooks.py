"""Private methods of Trainer that this library overrides."""

# Their parameters, as the overrides pass them on.
HOOK_PARAMETERS = {
    "_get_train_sampler": ["self", "train_dataset"],
    "_prepare_inputs": ["self", "inputs"],
    "_init_training_state": [
        *("self", "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial")
    ],
    "_get_output_dir": ["self", "trial"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_best_model": ["self"],
}
