"""Logits to calibrate on, and costs of their exits."""

import torch

COSTS = [0.2, 0.45, 0.8, 1.0]


def make_logits(num_images=1500, classes=10, exits=4, seed=0):
    """Over-confident exits of growing skill, that err on the same images more often than not."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (num_images,), generator=generator)
    hardness = torch.randn(num_images, generator=generator)
    shared = torch.randn(num_images, classes, generator=generator)
    exit_logits = []
    for skill in torch.linspace(1.5, 3, exits):
        logits = 0.7 * shared + 0.7 * torch.randn(num_images, classes, generator=generator)
        logits[torch.arange(num_images), labels] += (skill - 0.9 * hardness).clamp(min=0.1)
        exit_logits.append(2.5 * logits)
    return torch.stack(exit_logits), labels
