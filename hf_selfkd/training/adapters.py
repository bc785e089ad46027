"""Adapters of PEFT: what they train and save of a multi-exit model."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from transformers import Trainer

from ..methods.base import multi_exit_model


def is_adapted(network: nn.Module) -> bool:
    """Whether PEFT has put adapters into a multi-exit model."""
    return hasattr(network, "peft_config")


def warn_of_frozen_heads(model: nn.Module) -> None:
    """Warn if an adapter leaves heads as they are: PEFT freezes all that its configuration does not name.

    Args:
        model: A multi-exit model, or a module that wraps one.

    Warns:
        UserWarning: If an exit has no parameter to train.
    """
    network = multi_exit_model(model)
    if not is_adapted(network):
        return
    heads = [name for name, part in _heads(network) if not any(weight.requires_grad for weight in part.parameters())]
    if heads:
        warnings.warn(
            f"The adapter does not train {', '.join(heads)}: their weights stay as they are, at random in a model "
            f"from from_backbone. To train them, use LoraConfig(modules_to_save={heads}).",
            stacklevel=4,
        )


def _heads(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the exits with their names for ``modules_to_save``; of a classifier the name of the backbone's own."""
    for index, head in enumerate(network.exits):
        yield f"exits.{index}", head
    for name in ("pyramid", "head"):
        if hasattr(network, name):  # of segmentation, whose backbone has no head
            yield name, getattr(network, name)
    for classifier in getattr(network, "classifiers", ()):
        yield next(name for name, part in network.backbone.named_modules() if part is classifier), classifier


@contextmanager
def card_kept(trainer: Trainer, folder: str) -> Iterator[None]:
    """Keep the card in a folder as it is while PEFT saves, which writes a template or adds to what is there."""
    path = Path(folder) / "README.md"
    before = path.read_bytes() if path.is_file() else None
    yield
    if not is_adapted(trainer.network) or not trainer.args.should_save:
        return
    if before is not None:
        path.write_bytes(before)
    else:
        path.unlink(missing_ok=True)
