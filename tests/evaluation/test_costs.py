import json
import sys

import pytest
import timm
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from hf_selfkd import ExitPolicy, MultiExitForImageClassification, calibrate, exit_costs
from hf_selfkd.evaluation.costs import exit_latencies, exit_parameters, measure_throughput
from hf_selfkd.evaluation.curves import anytime_curve, budgeted_curve, collect_logits, plot_curves, to_table

# Multiply-adds of the plain networks at 224 pixels in billions, as the papers and timm give them.
PUBLISHED = {
    "resnet50": 4.11,
    "vit_small_patch16_224": 4.61,
    "swin_tiny_patch4_window7_224": 4.51,
    "efficientnet_b0": 0.39,
    "convnext_tiny": 4.47,
}
FAST = ("resnet50", "vit_small_patch16_224")


@pytest.mark.parametrize(
    ("name", "published"),
    [
        pytest.param(name, published, id=name, marks=[] if name in FAST else pytest.mark.slow)
        for name, published in PUBLISHED.items()
    ],
)
@pytest.mark.slow
def test_costs_are_those_of_the_parts(name, published):
    with torch.device("meta"):
        model = MultiExitForImageClassification.from_backbone(name).eval()
        plain = timm.create_model(name).eval()
        images = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        plain(images)
    full = counter.get_total_flops() / 2
    assert full / 1e9 == pytest.approx(published, rel=0.03)

    heads, trunks = [], []
    for head, stage in zip(model.exits, model.exit_stages, strict=True):
        shape = model.anatomy.stages[stage]
        with FlopCounterMode(display=False) as counter:
            head(torch.empty(1, shape.channels, *shape.size, device="meta"))
        heads.append(counter.get_total_flops() / 2)
        with torch.device("meta"):
            trunk = timm.create_model(name).eval()
        kept = trunk.prune_intermediate_layers([stage], prune_norm=True)
        with FlopCounterMode(display=False) as counter:
            trunk.forward_intermediates(images, indices=kept, intermediates_only=True, stop_early=True)
        trunks.append(counter.get_total_flops() / 2)
    expected = [trunk + sum(heads[: exit + 1]) for exit, trunk in enumerate([*trunks, full])]
    assert exit_costs(model, image_size=224) == pytest.approx(expected, rel=1e-6)


def test_costs_need_neither_the_weights_nor_the_configured_policy(build):
    model = build().eval()
    model.config.exit_policy, model.config.early_exit = ExitPolicy(thresholds=[0.0] * 3).to_dict(), True
    costs = exit_costs(model, image_size=32)
    assert costs == sorted(set(costs)) and len(costs) == 4 and all(isinstance(cost, int) for cost in costs)
    assert exit_costs(model, image_size=(32, 64))[0] > costs[0]
    assert exit_costs(model) == costs  # the size of config.pretrained_cfg


def test_latencies_grow_with_depth(build):
    latencies = exit_latencies(build().eval(), 32, batch_size=2, repeats=5)
    assert len(latencies) == 4 and 0 < latencies[0] and latencies == sorted(latencies)


def test_throughput_and_the_counted_speed_up(build):
    model, costs = build().eval(), [0.1, 0.3, 0.6, 1.0]
    policy = ExitPolicy(thresholds=[0.0, 2.0, 2.0])
    found = measure_throughput(model, torch.randn(4, 3, 32, 32), policy, costs, repeats=3)
    assert found["counted_speedup"] == pytest.approx(10.0)
    assert found["realised_speedup"] == pytest.approx(found["images_per_second"] / found["plain_images_per_second"])
    assert found["images_per_second"] > 0


def test_logits_are_collected_from_all_exits(build, batch):
    model = build().eval()
    model.config.exit_policy, model.config.early_exit = ExitPolicy(thresholds=[0.0] * 3).to_dict(), True
    halves = [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(0, 5), slice(5, 8))]
    logits, labels = collect_logits(model, halves)
    with torch.no_grad():
        expected = model(batch["pixel_values"], labels=batch["labels"]).exit_logits
    torch.testing.assert_close(logits, torch.stack(expected))
    assert torch.equal(labels, batch["labels"])
    with pytest.raises(ValueError, match="in eval mode, but it is in training mode. Call model.eval"):
        collect_logits(model.train(), halves)


def test_curves(tmp_path):
    labels = torch.arange(400) % 4
    exit_logits = torch.stack([torch.randn(400, 4) + k * torch.eye(4)[labels] for k in (1.0, 2.0, 3.0)])
    costs = [25.0, 50.0, 100.0]
    anytime = anytime_curve(exit_logits, labels, costs)
    assert [row["share"] for row in anytime] == [0.25, 0.5, 1.0]
    for row, logits in zip(anytime, exit_logits, strict=True):
        assert row["accuracy"] == pytest.approx((logits.argmax(dim=1) == labels).double().mean().item())
    given, kept = (exit_logits[:, :200], labels[:200]), (exit_logits[:, 200:], labels[200:])
    budgeted = budgeted_curve(*given, costs, *kept, targets=(0.2, 0.5, 1.0))
    assert [row["target"] for row in budgeted] == [0.5, 1.0]  # no exit is as cheap as 0.2
    exit_index, chosen = calibrate(*given, costs, target_cost=0.5).decide(kept[0])
    assert budgeted[0]["accuracy"] == pytest.approx((chosen.argmax(dim=1) == kept[1]).double().mean().item())
    assert budgeted[0]["cost"] == pytest.approx(torch.tensor(costs)[exit_index].mean().item())
    assert json.loads(json.dumps(budgeted)) == budgeted
    assert to_table(anytime).splitlines()[:2] == ["| exit | cost | share | accuracy |", "| --- | --- | --- | --- |"]
    assert len(to_table(anytime).splitlines()) == 5
    plot_curves({"exits": anytime, "policies": budgeted}, str(tmp_path / "curve.png"))
    assert Image.open(tmp_path / "curve.png").size[0] > 300


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(ImportError, match=r"pip install hf_selfkd\[plots\]"):
        plot_curves({}, "curve.png")


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_parameters_are_cumulative_up_to_each_exit(build, backbone):
    model = build(backbone)

    def count(*modules):
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    net, head = model.backbone, model.exits[0]
    if backbone == "test_resnet":
        first = count(net.conv1, net.bn1, net.layer1, head)
    else:
        first = count(net.patch_embed, *net.blocks[:2], head) + net.pos_embed.numel() + net.cls_token.numel()
        first += net.reg_token.numel() if net.reg_token is not None else 0
    found = exit_parameters(model)
    assert found[0] == first
    assert found == sorted(found)
    assert found[-1] == model.num_parameters()


def test_a_table_keeps_its_columns_whatever_the_cells_hold():
    rows = [{"setting": "augmentation", "value": "a|b\nc"}, {"value": 0.5}]
    assert to_table(rows).splitlines()[2:] == ["| augmentation | a\\|b c |", "|  | 0.5 |"]
