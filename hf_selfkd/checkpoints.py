"""What a training checkpoint holds beside the model, so that a run can go on."""

import json
import os

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SCAFFOLD_NAME = "scaffold.safetensors"
AVERAGE_NAME = "ema.safetensors"
METHOD_NAME = "method.json"


def save_state(state: dict[str, Tensor], folder: str, name: str) -> None:
    """Write tensors to a file of the checkpoint."""
    tensors = {key: tensor.contiguous() for key, tensor in state.items()}
    save_file(tensors, os.path.join(folder, name), metadata={"format": "pt"})


def load_state(folder: str, name: str, what: str) -> dict[str, Tensor]:
    """Read tensors from a file of the checkpoint.

    Raises:
        ValueError: If the run that wrote the checkpoint had none.
    """
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise ValueError(
            f"The checkpoint has no {name}: the run that wrote it had no {what}. Resume with the settings that wrote "
            "it, or start a new run from its weights with from_pretrained."
        )
    return load_file(path)


def save_method(folder: str, method: str) -> None:
    """Note which method wrote the checkpoint."""
    with open(os.path.join(folder, METHOD_NAME), "w") as file:
        json.dump({"name": method}, file)


def check_method(folder: str, method: str) -> None:
    """Raise ValueError if another method wrote the checkpoint."""
    path = os.path.join(folder, METHOD_NAME)
    if not os.path.isfile(path):
        return  # written by another trainer
    with open(path) as file:
        wrote = json.load(file)["name"]
    if wrote != method:
        raise ValueError(
            f"The checkpoint was written by method '{wrote}', but this run trains with '{method}'. Resume with the "
            "settings that wrote it, or start a new run from its weights with from_pretrained."
        )


def load_scaffold(scaffold: nn.Module, folder: str) -> None:
    """Load what only trains.

    Raises:
        ValueError: If the checkpoint has none, or that of another network.
    """
    state = load_state(folder, SCAFFOLD_NAME, "scaffold")
    if differing := state.keys() ^ scaffold.state_dict().keys():
        raise ValueError(
            f"{SCAFFOLD_NAME} was written by another method or another network: it differs in "
            f"{sorted(differing)[:3]} ({len(differing)} names in all). Resume with the settings that wrote it."
        )
    scaffold.load_state_dict(state, strict=False)  # a frozen teacher is not in the file
