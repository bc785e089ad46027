"""Data that draws random numbers, and the losses and weights of a run."""

import random

import numpy as np
import torch
from torch.utils.data import Dataset


class Augmented(Dataset):
    """Images with noise from all three global random states, as augmentations draw it."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(())
        return self.images[index] | {"pixel_values": self.images[index]["pixel_values"] + noise}


def same_weights(model, other):
    state = model.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
