"""The published losses in bare PyTorch, on a ResNet whose parts are called one by one.

What a paper's own training loop computes, without hooks, Trainer or this library's arithmetic: the tests show that the
trainer logs the same numbers and ends with the same weights, and `benchmarks/training.py` times one against the other.
Only the modules are those of the library, so that the weights are the same.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def predict(model: nn.Module, images: Tensor) -> SimpleNamespace:
    """Run a multi-exit ResNet and return its outputs with its scaffold; lists are ordered first to last."""
    net = model.backbone
    stem = net.maxpool(net.act1(net.bn1(net.conv1(images))))
    maps = [net.layer1(stem)]
    for layer in (net.layer2, net.layer3, net.layer4):
        maps.append(layer(maps[-1]))
    features = [net.global_pool(maps[-1])]
    logits = [net.fc(features[-1])]
    for exit, feature_map in zip(reversed(model.exits), reversed(maps[: len(model.exits)]), strict=True):
        exit_logits, exit_features = exit(feature_map.detach() if model.detach_exits else feature_map)
        logits.insert(0, exit_logits)
        features.insert(0, exit_features)
    return SimpleNamespace(images=images, maps=maps, features=features, logits=logits, scaffold=model.scaffold)


def detached_exits(out, labels: Tensor) -> Tensor:
    """Cross-entropy of the detached exits, for methods whose papers have no exits."""
    return sum(F.cross_entropy(logits, labels) for logits in out.logits[:-1])


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Hinton's softened Kullback-Leibler divergence, as all authors but BYOT's write it."""
    target = F.softmax(teacher.detach() / temperature, dim=1)
    return F.kl_div(F.log_softmax(student / temperature, dim=1), target, reduction="batchmean") * temperature**2


def none(out, labels, epoch):
    """The final exit learns from the labels alone."""
    return F.cross_entropy(out.logits[-1], labels) + detached_exits(out, labels)


def deep_supervision(out, labels, epoch):
    """Every exit learns from the labels (Lee et al. 2015)."""
    return sum(F.cross_entropy(logits, labels) for logits in out.logits)


def byot(out, labels, epoch):
    """BYOT, the paper's equations with the squared hint as a mean."""
    total = F.cross_entropy(out.logits[-1], labels)
    for logits, features in zip(out.logits[:-1], out.features[:-1], strict=True):
        total = total + 0.7 * F.cross_entropy(logits, labels) + 0.3 * divergence(logits, out.logits[-1], 3)
        total = total + 0.03 * F.mse_loss(features, out.features[-1].detach())
    return total


def eed(out, labels, epoch):
    """EED, the authors' default: mean squared errors to the means over all exits."""
    logits_mean = (sum(out.logits) / len(out.logits)).detach()
    features_mean = (sum(out.features) / len(out.features)).detach()
    total = 0
    for logits, features in zip(out.logits, out.features, strict=True):
        total = total + F.cross_entropy(logits, labels) + F.mse_loss(logits, logits_mean)
        total = total + F.mse_loss(features, features_mean)
    return total


def dks(out, labels, epoch):
    """DKS, the authors' loop over ordered pairs of exits."""
    total = 0
    for logits in out.logits:
        total = total + F.cross_entropy(logits, labels)
        for other in out.logits:
            if other is not logits:
                total = total + divergence(logits, other, 1)
    return total


def uskd(out, labels, epoch):
    """USKD, image by image, as the authors' code but for the logarithm in its ranking; their weights for ImageNet."""
    weak = out.scaffold.classifier(out.maps[-2].mean(dim=(2, 3)))
    final, weak_log, log = (F.softmax(out.logits[-1], 1), F.log_softmax(weak, 1), F.log_softmax(out.logits[-1], 1))
    count, classes = final.shape
    confidence = [final[image, label].detach() for image, label in enumerate(labels)]
    mean_square = sum(value**2 for value in confidence) / count
    total = F.cross_entropy(out.logits[-1], labels)
    for image, label in enumerate(labels.tolist()):
        soft = 1 + confidence[image] ** 2 - mean_square
        smooth = [0.9 * (other == label) + 0.1 / classes for other in range(classes)]
        weak_loss = -sum(smooth[other] * weak_log[image, other] for other in range(classes))
        weak_p = weak_log[image].exp()
        score = final[image] / (1 - final[image, label]) + weak_p / (1 - weak_p[label])
        order = sorted(range(classes), key=lambda other, score=score: -score[other].item())
        share = {other: 1 / (order.index(other) + 1) for other in range(classes) if other != label}
        rest = torch.logsumexp(torch.stack([out.logits[-1][image, other] for other in share]), 0)
        others = -sum(share[other] * (out.logits[-1][image, other] - rest) for other in share) / sum(share.values())
        total = total + (-soft * log[image, label] + 0.1 * others + 0.005 * weak_loss) / count
    return total + detached_exits(out, labels)


def frskd(out, labels, epoch):
    """FRSKD, the authors' command line for CIFAR-100."""
    maps = out.scaffold.pyramid(out.maps)
    teacher = out.scaffold.classifier(maps[-1].mean(dim=(2, 3)))
    total = F.cross_entropy(out.logits[-1], labels) + F.cross_entropy(teacher, labels)
    total = total + 2 * divergence(out.logits[-1], teacher, 4)
    for student_map, teacher_map in zip(out.maps, maps, strict=True):
        student_at, teacher_at = (
            F.normalize(x.pow(2).mean(1).flatten(1)) for x in (student_map, teacher_map.detach())
        )
        total = total + 100 * (student_at - teacher_at).pow(2).mean()
    return total + detached_exits(out, labels)


def lsh(out, labels, epoch):
    """LSH between exits: the authors' loss, on the images that the final exit classifies correctly."""
    weight, bias = out.scaffold.weight, out.scaffold.bias
    teacher = out.features[-1].detach()
    correct = (out.logits[-1].argmax(1) == labels).float()
    bits = (teacher @ weight.T + bias > 0).float()
    total = sum(F.cross_entropy(logits, labels) for logits in out.logits)
    for features in out.features[:-1]:
        squares = (features - teacher).pow(2).mean(1)
        hashes = F.binary_cross_entropy_with_logits(features @ weight.T + bias, bits, reduction="none").mean(1)
        total = total + 6 * ((squares + hashes) * correct).sum() / correct.sum().clamp(min=1)
    return total


def okd_mde(out, labels, epoch):
    """OKD-MDE as `methods/okd_mde.py` reads it: branches, fused target, divergence, overlap of the classifiers."""
    branches, fusion = out.scaffold.branches, out.scaffold.fusion
    students = [(out.logits[-1], out.features[-1])] + [branch(out.maps[-2]) for branch in branches]
    logits, features = zip(*students, strict=True)
    hidden = F.relu(fusion.norm(fusion.squeeze(torch.cat(features, 1))))
    gates = F.softmax(fusion.gate(hidden), dim=1)
    target = sum(gate.unsqueeze(1) * student for gate, student in zip(gates.unbind(1), logits, strict=True))
    ramp = math.exp(-5 * (1 - min(math.floor(epoch), 80) / 80) ** 2)
    total = sum(F.cross_entropy(student, labels) for student in logits) + F.cross_entropy(target, labels)
    total = total + ramp * sum(divergence(student, target, 3) for student in logits)
    weights = [classifiers[0].weight for classifiers in out.scaffold._classifiers]
    for first in range(len(weights)):
        for second in range(first):
            total = total + 2e-3 * (weights[first].T @ weights[second]).norm()
    return total + detached_exits(out, labels)


LOSSES = {loss.__name__: loss for loss in (none, deep_supervision, byot, eed, dks, frskd, lsh, okd_mde, uskd)}


def train(model: nn.Module, method: str, batches, optimizer: torch.optim.Optimizer, epochs, bf16: bool = False):
    """Train on batches, each at its epoch, as a paper's loop does; return the losses, one tensor per batch."""
    model.train()
    losses = []
    for batch, epoch in zip(batches, epochs, strict=False):
        with torch.autocast(batch["pixel_values"].device.type, torch.bfloat16, enabled=bf16):
            loss = LOSSES[method](predict(model, batch["pixel_values"]), batch["labels"], epoch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses
