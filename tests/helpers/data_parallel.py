"""Networks and data to compare training on several processes with training on one."""

import timm
import torch

from hf_selfkd import MultiExitForImageClassification, MultiExitForSemanticSegmentation

GLOBAL_BATCH = 12
VIT = {"img_size": 32, "patch_size": 8}  # layer norm, in its exits too
# Batch norm sees the batch of its process only; it is replaced in the self-teacher and in the ResNets.
CASES = {
    "none": ("test_vit", {}),
    "deep_supervision": ("test_vit", {}),
    "byot": ("test_vit", {}),
    "eed": ("test_vit", {}),
    "dks": ("test_vit", {}),
    "ps_kd": ("test_vit", {"ramp_epochs": 2}),
    "uskd": ("test_vit", {}),
    "frskd": ("test_vit", {}),
    "lsh": ("test_vit", {"num_hashes": 64}),
    "lsh with a teacher": ("test_vit", {"num_hashes": 64, "teacher": "test_vit"}),
    "okd_mde": ("test_vit", {}),
    "kd": ("test_vit", {"teacher": "test_vit"}),
    "kd with an averaged teacher": ("test_vit", {"teacher": "ema", "teacher_decay": 0.5, "loss": "dkd"}),
    "eed+lsh": ("test_vit", {"lsh": {"num_hashes": 64}}),
    "frskd on a ResNet": ("test_resnet", {}),
    "okd_mde on a ResNet": ("test_resnet", {}),
    "byot for label sets": ("label_sets", {}),
    "frskd for segmentation": ("segmenter", {"ramp_start": 0, "ramp_end": 1}),
}


def network(name):
    torch.manual_seed(0)
    if name == "segmenter":
        return MultiExitForSemanticSegmentation.from_backbone(
            "test_resnet", num_labels=3, pyramid_width=8, semantic_loss_ignore_index=11
        )
    kwargs = {"small_input_stem": True} if name == "test_resnet" else {"backbone_kwargs": VIT}
    if name == "label_sets":
        name, kwargs["problem_type"] = "test_vit", "multi_label_classification"
    return MultiExitForImageClassification.from_backbone(name, num_labels=5, **kwargs)


def teacher():
    torch.manual_seed(1)
    return timm.create_model("test_vit", num_classes=5, **VIT)


def samples(name, count=24):
    """Return images, some without a label, or label maps, some with ignored pixels only, more in the first half.

    Some labels of label sets are unknown.
    """
    generator = torch.Generator().manual_seed(0)
    data = []
    for index in range(count):
        unlabelled = index % 3 == 0 and index < 18
        pixels = torch.randn(3, 32, 32, generator=generator)
        if name == "segmenter":
            labels = torch.zeros(32, 32, dtype=torch.long)
            labels[:, 16:] = 1
            labels[: 32 if unlabelled else index] = 11
            pixels = pixels + 2 * (labels == 1) - 1
        elif name == "label_sets":
            known = [-100 if index == label else index >> label & 1 for label in range(5)]
            labels = torch.tensor([-100] * 5 if unlabelled else known)
            pixels = pixels + labels[2:5].clamp(min=0).view(3, 1, 1)
        else:
            labels = -100 if unlabelled else index % 5
            pixels = pixels + index % 5 - 2
        data.append({"pixel_values": pixels, "labels": labels})
    return data
