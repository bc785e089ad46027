"""Training recipes: small images from scratch, as in the papers, or photographs, by family of backbones."""

from argparse import Namespace
from typing import Any

from data import has_photos
from timm.models import is_model_in_modules

PHOTOS: dict[str, Any] = {
    "small_input_stem": False,
    **dict.fromkeys(["image_size", "mean", "std", "crop_pct"]),  # None: those of the backbone
    "crop_scale": 0.35,
    "decay_norms": False,
    "lr_milestones": [],
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # of all steps
    "max_grad_norm": 1.0,
    "num_train_epochs": 20,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,  # 500 images of 224 pixels take 5.5 GB
}
SGD = {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true", "weight_decay": 1e-4}
ADAMW = {"optim": "adamw_torch", "optim_args": None, "weight_decay": 0.05}
TRANSFORMERS = {"beit", "cait", "deit", "eva", "swin_transformer", "swin_transformer_v2", "vision_transformer", "xcit"}
# timm's modules, the optimizer, and learning rates for batches of 32: from timm's weights, and from scratch.
FAMILIES = [({"resnet"}, SGD, (0.005, 0.02)), (TRANSFORMERS, ADAMW, (1e-4, 5e-4))]
OTHERS = (ADAMW, (5e-4, 5e-4))


def choose_recipe(options: Namespace) -> str | None:
    """Return the recipe that ``--recipe`` names, for ``auto`` the one that fits the images.

    Raises:
        ValueError: If there is no such recipe, or the data cannot be found.
    """
    if options.recipe not in (None, "auto", "cifar", "photos"):
        raise ValueError(f"--recipe takes cifar, photos or auto, but got {options.recipe!r}.")
    if options.recipe == "auto":
        return "photos" if has_photos(options) else "cifar"
    return options.recipe


def recipe_defaults(recipe: str | None, options: Namespace) -> dict[str, Any]:
    """Return the options that a recipe sets; that for small images is the default of the scripts.

    Args:
        recipe: Return value of :func:`choose_recipe`.
        options: The options, of which ``backbone`` and ``pretrained`` are read.
    """
    if recipe != "photos":
        return {}
    optimizer, (from_weights, from_scratch) = OTHERS
    for modules, *settings in FAMILIES:
        if ":" not in options.backbone and is_model_in_modules(options.backbone, modules):
            optimizer, (from_weights, from_scratch) = settings
    return PHOTOS | optimizer | {"learning_rate": from_weights if options.pretrained else from_scratch}
