"""Learning-rate milestones, mixing and groups of weight decay."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from hf_selfkd import get_method
from hf_selfkd.functional import add, smooth_labels
from hf_selfkd.training.recipe import MilestoneLR, decayed_parameters
from tests.helpers.runs import losses


def test_the_rate_rises_and_falls_at_milestones():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = MilestoneLR(optimizer, [4, 6], gamma=0.5, warmup_steps=3)
    rates = []
    for _ in range(7):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.05, 0.05, 0.025])


def test_milestones_are_in_epochs_and_each_run_has_its_own(build, train):
    options = {"trainer_kwargs": {"lr_milestones": [1, 3], "lr_gamma": 0.5}}
    trainer = train(build(), "none", num_train_epochs=4, learning_rate=0.1, **options)
    for _ in range(2):
        rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
        assert rates == pytest.approx([0.1] * 4 + [0.05] * 8 + [0.025] * 4)
        trainer.train()


def test_decay_leaves_out_what_timm_leaves_out(build):
    model = build("test_vit")
    names = dict(model.named_parameters())
    decayed = set(decayed_parameters(model))
    assert {"backbone.blocks.0.mlp.fc1.weight", "exits.0.mlp.0.weight"} <= decayed
    for name in ("pos_embed", "cls_token", "norm.weight", "blocks.0.mlp.fc1.bias"):
        assert f"backbone.{name}" in names
        assert f"backbone.{name}" not in decayed
    wrapped = decayed_parameters(torch.nn.ModuleDict({"inner": model}))
    assert set(wrapped) == {f"inner.{name}" for name in decayed}


def test_norms_decay_where_that_is_asked_for(build, train):
    trainer = train(build("test_vit"), max_steps=1, trainer_kwargs={"decay_norms": True})
    assert set(trainer.get_decay_parameter_names(trainer.model)) == set(dict(trainer.model.named_parameters()))


def test_label_smoothing_and_mixing_reach_every_label_term(build, batch, train):
    smoothed = train(build(), "deep_supervision", max_steps=1, label_smoothing_factor=0.1)
    plain = train(build(), "deep_supervision", max_steps=1)
    assert losses(smoothed)[0] != losses(plain)[0]
    labels = smooth_labels(batch["labels"], 5, 0.1)
    output = build().train()(batch["pixel_values"])
    expected = sum(
        torch.nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.1)
        for logits in output.exit_logits
    )
    found = add(get_method("deep_supervision")(output, labels, 0.0).values())
    torch.testing.assert_close(found, expected)
    seen = []

    def mix(pixel_values, labels):
        seen.append(tuple(labels.shape))
        return v2.MixUp(num_classes=5)(pixel_values, labels)

    mixed = train(build(), "byot", trainer_kwargs={"mix": mix}, label_smoothing_factor=0.1)
    assert seen == [(5,)] * 4
    assert all(np.isfinite(losses(mixed)))
