"""Data that draws random numbers, and the losses, logs and weights of a run."""

import random

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from hf_selfkd import MultiExitConfig
from hf_selfkd.tasks import TASKS
from hf_selfkd.training.label_checks import LabelCheck


class Augmented(Dataset):
    """Images with noise from all three global random states, as augmentations draw it."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(())
        return self.images[index] | {"pixel_values": self.images[index]["pixel_values"] + noise}


class Once(TrainerCallback):
    """Do something at the end of one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def same_weights(model, other):
    state = model.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logged(trainer):
    """Return the log without times and without the mean over the steps of one call."""
    left_out = ("runtime", "per_second", "train_loss", "total_flos")
    log = trainer.state.log_history
    log = [{key: value for key, value in entry.items() if not key.endswith(left_out)} for entry in log]
    return [entry for entry in log if entry.keys() - {"epoch", "step"}]


def check_of(num_labels, name, task="image-classification", **config):
    """Return the check of labels for a model with so many classes."""
    return LabelCheck(TASKS[task], MultiExitConfig(num_labels=num_labels, **config), name)
