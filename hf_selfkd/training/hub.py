"""Uploads during and after training: complete, without a token in any file, and with failures reported."""

import os
import shutil
import warnings

from huggingface_hub import create_branch
from transformers import Trainer, TrainerCallback
from transformers.utils import IMAGE_PROCESSOR_NAME


class HiddenToken(str):
    """A token that is never written to a file: it is pickled as ``None``, as in ``training_args.bin``."""

    def __reduce__(self):
        return type(None), ()

    def __deepcopy__(self, memo):
        return self


class ReportPushes(TrainerCallback):
    """Warn once about each failed background upload, which transformers does not report."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_push_begin(self, args, state, control, **kwargs):
        """Report the uploads that have failed before the next one."""
        self.report()

    def on_train_end(self, args, state, control, **kwargs):
        """Wait for the last upload, and report it."""
        if getattr(self.trainer, "push_in_progress", None) is not None:
            self.trainer.push_in_progress.wait_until_done()
        self.report()

    def report(self) -> None:
        """Report the uploads that have failed, and forget those that are done."""
        push = getattr(self.trainer, "push_in_progress", None)
        for job in list(push.jobs) if push is not None else []:
            if job.done():
                push.jobs.remove(job)
                if (error := job.exception()) is not None:
                    warnings.warn(
                        f"Could not upload a checkpoint to {self.trainer.hub_model_id}: {type(error).__name__}: "
                        f"{error} Training continues, and the next upload includes the missing files.",
                        stacklevel=2,
                    )


def ensure_branch(trainer: Trainer, revision: str | None, token: str | None = None) -> None:
    """Create a branch of the trainer's repository if it does not exist; revisions such as ``refs/pr/1`` are not."""
    if revision is not None and not revision.startswith("refs/") and trainer.is_world_process_zero():
        token = trainer.args.hub_token if token is None else token
        create_branch(trainer.hub_model_id, branch=revision, token=token, exist_ok=True)


def copy_loading_files(checkpoint_folder: str, output_dir: str) -> None:
    """Copy the files that loading needs besides configuration and weights to the folder that is pushed."""
    for name in os.listdir(checkpoint_folder):
        if name.endswith(".py") or name == IMAGE_PROCESSOR_NAME:
            shutil.copy(os.path.join(checkpoint_folder, name), output_dir)
