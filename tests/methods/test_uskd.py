import math

import pytest
import torch

from hf_selfkd import MultiExitOutput, get_method
from hf_selfkd.functional import non_target_log_softmax, target_classes
from hf_selfkd.methods.customized_labels import target_labels, zipf_labels


def output_of(final, weak):
    """Return an output whose final exit and weak classifier predict these probabilities."""
    return MultiExitOutput(
        exit_logits=(torch.tensor(final).log(),), scaffold={"weak_logits": torch.tensor(weak).log()}
    )


def test_two_images_by_hand():
    output = output_of([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], [[0.4, 0.2, 0.4], [0.6, 0.2, 0.2]])
    terms = get_method("uskd", target_weight=2, non_target_weight=3, weak_weight=5)(output, torch.tensor([0, 2]), 0.0)
    assert terms["label"].item() == pytest.approx(-(math.log(0.5) + math.log(0.8)) / 2, abs=1e-6)
    mean = (0.5**2 + 0.8**2) / 2
    target = -((1 + 0.5**2 - mean) * math.log(0.5) + (1 + 0.8**2 - mean) * math.log(0.8)) / 2
    assert terms["target"].item() == pytest.approx(2 * target, abs=1e-6)
    # Scores of the first image: 1 + 2/3 for its class, 3/5 + 1/3 and 2/5 + 2/3 for the others, so ranks 1, 3, 2; of
    # the second: 1/2 + 3/4 and 1/2 + 1/4, and 4 + 1/4 for its class, so ranks 2, 3, 1.
    first = -(2 / 5 * math.log(3 / 5) + 3 / 5 * math.log(2 / 5))
    second = -(3 / 5 * math.log(1 / 2) + 2 / 5 * math.log(1 / 2))
    assert terms["non_target"].item() == pytest.approx(3 * (first + second) / 2, abs=1e-6)
    smooth = [[0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3], [0.1 / 3, 0.1 / 3, 0.9 + 0.1 / 3]]
    weak = [[0.4, 0.2, 0.4], [0.6, 0.2, 0.2]]
    loss = -sum(y * math.log(p) for ys, ps in zip(smooth, weak, strict=True) for y, p in zip(ys, ps, strict=True)) / 2
    assert terms["weak"].item() == pytest.approx(5 * loss, abs=1e-5)


def test_an_image_without_a_label_has_no_part():
    output = output_of([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], [[0.4, 0.2, 0.4], [0.6, 0.2, 0.2]])
    alone = output_of([[0.5, 0.3, 0.2]], [[0.4, 0.2, 0.4]])
    method = get_method("uskd")
    torch.testing.assert_close(method(output, torch.tensor([0, -100]), 0.0), method(alone, torch.tensor([0]), 0.0))
    assert set(map(float, method(output, torch.tensor([-100, -100]), 0.0).values())) == {0.0}


def test_classes_of_a_label():
    labels = torch.tensor([[0.0, 1, 0, 0], [0.7, 0, 0.3, 0], [0.85, 0.05, 0.05, 0.05], [0, 0, 0, 0]])
    expected = [[False, True, False, False], [True, False, True, False], [True, False, False, False], [False] * 4]
    assert target_classes(labels).tolist() == expected
    assert target_classes(torch.tensor([[0.6, 0.4]])).tolist() == [[True, False]]


def test_soft_labels_of_mixed_labels():
    logits, labels = torch.tensor([[0.1, 0.8, 0.1], [0.9, 0.05, 0.05]]).log(), torch.tensor([[0.7, 0, 0.3], [0, 1, 0]])
    is_target = target_classes(labels)
    squares = torch.tensor([0.01, 0.01, 0.0025])
    expected = torch.tensor([[0.7 + 0.01, 0, 0.3 + 0.01], [0, 1 + 0.0025, 0]]) - squares.mean() * is_target
    torch.testing.assert_close(target_labels(logits, labels, is_target), expected)
    confident = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).clamp(min=1e-6).log()
    assert target_labels(confident, torch.tensor([[0.0, 0.02, 0.98], [0, 1, 0]]), is_target).min() == 0


def test_ratios_of_a_certain_prediction_are_exact():
    logits, is_target = torch.tensor([[200.0, 1, 0]]), torch.tensor([[True, False, False]])
    rest = math.log(math.e + 1)
    assert non_target_log_softmax(logits, is_target)[0, 1:].tolist() == pytest.approx([1 - rest, -rest])
    labels = zipf_labels(logits, logits, is_target)
    assert labels.tolist()[0] == pytest.approx([0, 3 / 5, 2 / 5])


def test_the_weak_classifier_reads_the_stage_before_the_last_and_trains_the_backbone(build, batch):
    model = build("test_resnet").train()
    method = get_method("uskd")
    method.attach(model)
    assert model.scaffold.stage == model.exit_stages[-1] and model.detach_exits
    output = model(batch["pixel_values"])
    pooled = model(batch["pixel_values"], output_hidden_states=True).exit_maps[model.scaffold.stage].mean(dim=(2, 3))
    torch.testing.assert_close(output.scaffold["weak_logits"], model.scaffold.classifier(pooled))
    method.terms(output, batch["labels"], 0.0)["weak"].backward()
    assert next(model.backbone.parameters()).grad.abs().sum() > 0


def test_errors(exits_of_vectors):
    with pytest.raises(ValueError, match="USKD was called without its weak classifier"):
        get_method("uskd")(*exits_of_vectors, 0.0)
    for name, bound in (("target_weight", ">="), ("non_target_weight", ">="), ("weak_weight", ">")):
        with pytest.raises(ValueError, match=f"USKD needs {name} {bound} 0, but got {name}=-1"):
            get_method("uskd", **{name: -1})
