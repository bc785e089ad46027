"""A transformers Trainer whose uploads are complete, hold no token and say why they failed."""

import os
import shutil
import warnings

from huggingface_hub import create_branch
from transformers import Trainer
from transformers.utils import IMAGE_PROCESSOR_NAME

from ..models.uploads import explained_upload, reason_of


class _Token(str):
    """A token that is never written to a file: it is pickled as ``None``, such as into training_args.bin."""

    def __reduce__(self):
        return type(None), ()

    def __deepcopy__(self, memo):
        return self


class HubTrainer(Trainer):
    """What ``--push_to_hub`` needs beyond the stock Trainer; its arguments and ``hub_strategy`` work as there."""

    def __init__(self, model=None, args=None, **kwargs):
        if args is not None and args.hub_token is not None:
            args.hub_token = _Token(args.hub_token)
        super().__init__(model=model, args=args, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, and the branch ``hub_revision``, where there is none."""
        super().init_hf_repo(token=token, private=private)
        self._create_branch(self.args.hub_revision, token)

    def _create_branch(self, revision: str | None, token: str | None) -> None:
        if revision is not None and not revision.startswith("refs/") and self.is_world_process_zero():
            token = self.args.hub_token if token is None else token
            create_branch(self.hub_model_id, branch=revision, token=token, exist_ok=True)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """Save the model with all that loading needs, write its card and upload them. See ``Trainer.push_to_hub``.

        A branch that is not there is created.

        Raises:
            OSError: If the upload failed. The model is saved in ``output_dir``.
        """
        folder = self.args.output_dir
        if not self.args.push_to_hub:
            self.save_model(_internal_call=True)  # the repository is yet to be created, and that may fail
        repo_id = self.hub_model_id or self.args.hub_model_id or os.path.basename(os.path.abspath(folder))
        with explained_upload(repo_id, f"The model is saved in {folder}."):
            if self.hub_model_id is None:
                self.init_hf_repo(token=token, private=private)
            self._create_branch(revision, token)
            return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint in the background, with what loading needs beside configuration and weights."""
        self._warn_of_failed_pushes()
        for name in os.listdir(checkpoint_folder):
            if name.endswith(".py") or name == IMAGE_PROCESSOR_NAME:
                shutil.copy(os.path.join(checkpoint_folder, name), self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._warn_of_failed_pushes()

    def _warn_of_failed_pushes(self) -> None:
        """Warn once of each upload in the background that has failed; transformers does not look."""
        push = getattr(self, "push_in_progress", None)
        for job in list(push.jobs) if push is not None else []:
            if job.done():
                push.jobs.remove(job)
                if (error := job.exception()) is not None:
                    warnings.warn(
                        f"Could not upload a checkpoint to {self.hub_model_id}: {reason_of(error)}. The run goes on, "
                        "and the next upload holds what this one lacked.",
                        stacklevel=2,
                    )
