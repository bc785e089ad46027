"""A new method in one file: every exit learns from the next one. Run it to train on scikit-learn's digits."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from sklearn.datasets import load_digits
from transformers import TrainingArguments

from hf_selfkd import Method, MultiExitForImageClassification, SelfDistillationTrainer
from hf_selfkd.functional import add, cross_entropy, soften_kl


@dataclass(frozen=True, kw_only=True)
class Ladder(Method):
    """Every early exit learns from the labels and from the next exit; the final exit from the labels alone."""

    name: ClassVar[str] = "ladder"  # in get_method, the command line and the model card
    paper: ClassVar[str] = "https://example.org/ladder"  # cited by the model card
    temperature: float = 3.0  # a field is a hyper-parameter

    def __call__(self, output, labels, epoch):
        """Return the terms of the loss: the trainer logs each under its name and minimises their sum."""
        steps = zip(output.exit_logits[:-1], output.exit_logits[1:], strict=True)
        return {
            "label": cross_entropy(output.exit_logits, labels),
            "step": add(soften_kl(early, late, self.temperature) for early, late in steps),
        }


if __name__ == "__main__":
    scans, digits = (torch.tensor(array) for array in load_digits(return_X_y=True))
    pixels = scans.float().reshape(-1, 1, 8, 8).div(8).sub(1)
    images = [{"pixel_values": image, "labels": int(digit)} for image, digit in zip(pixels, digits, strict=True)]
    config = {"num_labels": 10, "small_input_stem": True, "backbone_kwargs": {"in_chans": 1}}
    model = MultiExitForImageClassification.from_backbone("test_resnet", **config)
    args = TrainingArguments("runs/ladder", num_train_epochs=3, learning_rate=5e-3, per_device_train_batch_size=32)
    trainer = SelfDistillationTrainer(model, args, "ladder", train_dataset=images[360:], eval_dataset=images[:360])
    trainer.train()
    print({name: value for name, value in trainer.evaluate().items() if "accuracy" in name})
