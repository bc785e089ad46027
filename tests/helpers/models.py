"""Small models, each built once per process."""

import copy
import pickle
from functools import lru_cache

import torch

# Arguments that keep networks small, for 32-pixel images.
SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 4, 8),
}
DEIT = {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 48, "num_heads": 3}


def build_copy(model_class, backbone, **config):
    """Return a copy of a model, seeded with 0, that this process builds once: building takes ten times as long.

    The random state is afterwards as if the model had been built.
    """
    model, random_state = _built(model_class, backbone, pickle.dumps(config))
    torch.set_rng_state(random_state)
    return copy.deepcopy(model)


@lru_cache(maxsize=64)
def _built(model_class, backbone, config):
    torch.manual_seed(0)
    return model_class.from_backbone(backbone, **pickle.loads(config)), torch.get_rng_state()
