import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

from hf_selfkd import ExitPolicy, MultiExitForSemanticSegmentation, export_early_exit
from hf_selfkd.models.exit_policy import CRITERIA

POLICY = ExitPolicy(thresholds=[0.5, 0.6], temperatures=[2.0, 0.5, 1.0])


def session_of(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def branches_of(graph):
    """Yield the graphs of all branches, however deep."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield attribute.g
                yield from branches_of(attribute.g)


@torch.no_grad()
def spread(model, policy, images):
    """Return a policy with thresholds between the scores of images, so that they exit everywhere."""
    thresholds, history = [], None
    for exit, logits in enumerate(model(images, output_hidden_states=True).exit_logits[:-1]):
        scores, _, history = policy.score(exit, logits, history)
        found = scores.unique()
        thresholds.append(found[-len(found) // 2 - 1 :][:2].mean().item())
    return ExitPolicy(criterion=policy.criterion, temperatures=policy.temperatures, thresholds=thresholds)


def compare(model, policy, session, images, **inputs):
    expected = model.early_exit(images, policy)
    logits, exit_index, confidence = session.run(None, {"pixel_values": images.numpy(), **inputs})
    assert exit_index.tolist() == expected.exit_index.tolist()
    torch.testing.assert_close(torch.from_numpy(logits), expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(confidence), expected.confidence, rtol=1e-4, atol=1e-5)
    return set(exit_index.tolist())


def test_one_onnx_file_exits_early(build, tmp_path):
    model = build(exits=[0, 2]).train()
    model.config.exit_policy = POLICY.to_dict()
    path = export_early_exit(model, tmp_path / "exits.onnx", image_size=32)
    assert model.training
    assert [file.name for file in tmp_path.iterdir()] == ["exits.onnx"]
    model.eval()
    session, images = session_of(path), torch.randn(24, 3, 32, 32) * torch.linspace(0.1, 4, 24).view(-1, 1, 1, 1)
    compare(model, POLICY, session, images)  # thresholds by default
    policy = spread(model, POLICY, images)
    thresholds = np.array(policy.thresholds, dtype=np.float32)
    assert len(compare(model, policy, session, images, thresholds=thresholds)) == 3
    for count in (1, 5):
        compare(model, policy, session, images[:count], thresholds=thresholds)

    file = onnx.load(path)
    metadata = {entry.key: json.loads(entry.value) for entry in file.metadata_props}
    assert metadata["thresholds"] == [0.5, 0.6]
    assert metadata["temperatures"] == [2.0, 0.5, 1.0]
    assert metadata["input_size"] == [3, 32, 32]
    assert metadata["mean"] == list(model.config.pretrained_cfg["mean"])
    assert metadata["labels"] == [model.config.id2label[index] for index in range(model.config.num_labels)]
    stored = sum(torch.Size(tensor.dims).numel() for tensor in file.graph.initializer)
    assert stored <= 1.02 * sum(parameter.numel() for parameter in model.parameters())  # none is there twice
    branches = [*branches_of(file.graph)]
    assert len(branches) == 4
    assert not any(branch.initializer for branch in branches)
    # onnxruntime optimises a convolution only if its weights come from its own graph.
    convolutions = [(branch, node) for branch in branches for node in branch.node if node.op_type == "Conv"]
    assert len(convolutions) > 4
    for branch, node in convolutions:
        assert {*node.input[1:]} <= {reshape.output[0] for reshape in branch.node if reshape.op_type == "Reshape"}


@pytest.mark.slow
@pytest.mark.parametrize("shrink", [True, False])
@pytest.mark.parametrize(
    ("name", "criterion"),
    [*(("test_resnet", name) for name in CRITERIA), ("test_vit", "confidence"), ("test_efficientnet", "entropy")],
)
def test_every_criterion_in_onnx(build, tmp_path, name, criterion, shrink):
    multi_label = CRITERIA[criterion].multi_label
    model = build(name, problem_type="multi_label_classification" if multi_label else None).eval()
    policy = ExitPolicy(criterion=criterion, thresholds=[0.5] * (model.num_exits - 1))
    session = session_of(export_early_exit(model, tmp_path / "exits.onnx", policy, image_size=32, shrink=shrink))
    images = torch.randn(24, 3, 32, 32) * torch.linspace(0.1, 4, 24).view(-1, 1, 1, 1)
    policy = spread(model, policy, images)
    compare(model, policy, session, images, thresholds=np.array(policy.thresholds, dtype=np.float32))


@pytest.mark.parametrize("criterion", ["confidence", pytest.param("patience", marks=pytest.mark.slow)])
def test_a_folder_of_torch_programs_runs_without_this_library(build, tmp_path, criterion):
    model = build(exits=[0, 2]).eval()
    images = torch.randn(9, 3, 32, 32) * torch.linspace(0.1, 4, 9).view(-1, 1, 1, 1)
    policy = spread(model, ExitPolicy(criterion=criterion, thresholds=[0.5] * 2), images)
    folder = export_early_exit(model, tmp_path / "exits", policy, format="torch", image_size=32)
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch; from early_exit import EarlyExit\n"
        "found = EarlyExit('.')(torch.load('../images.pt'))\n"
        "assert 'hf_selfkd' not in sys.modules and 'timm' not in sys.modules\n"
        "torch.save(found, '../found.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    logits, exit_index, confidence = torch.load(tmp_path / "found.pt")
    expected = model.early_exit(images, policy)
    assert exit_index.tolist() == expected.exit_index.tolist()
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(confidence, expected.confidence, rtol=1e-4, atol=1e-5)


def test_a_file_that_differs_is_not_kept(build, tmp_path, monkeypatch):
    def write_other(steps, policy, metadata, path):
        path.write_text("draft")
        return lambda images, thresholds: (torch.zeros(len(images), 5), torch.zeros(len(images)).long(), None)

    monkeypatch.setattr(sys.modules["hf_selfkd.deploy.export_early_exit"], "_write_onnx", write_other)
    with pytest.raises(RuntimeError, match="of the exported file"):
        export_early_exit(build(exits=[0, 2]).eval(), tmp_path / "exits.onnx", POLICY, image_size=32)
    assert not [*tmp_path.iterdir()]


def test_errors(build, tmp_path):
    model = build(exits=[0, 2]).eval()
    with pytest.raises(ValueError, match="format must be one of onnx, torch, but got 'tflite'."):
        export_early_exit(model, tmp_path / "file", POLICY, format="tflite")
    with pytest.raises(ValueError, match="early_exit needs a policy"):
        export_early_exit(model, tmp_path / "file")
    with pytest.raises(ValueError, match="Torch programs go to a new folder, but .* exists"):
        export_early_exit(model, tmp_path, POLICY, format="torch")
    segmentation = MultiExitForSemanticSegmentation.from_backbone("test_resnet", num_labels=3)
    with pytest.raises(ValueError, match="Only models for classification exit early, but this one is for image-segm"):
        export_early_exit(segmentation, tmp_path / "file", POLICY)


@pytest.mark.slow
def test_dynamic_quantisation_reaches_the_branches_and_keeps_the_thresholds(build, tmp_path):
    model = build("test_vit").eval()
    policy = ExitPolicy(thresholds=[0.5] * (model.num_exits - 1))
    path = export_early_exit(model, tmp_path / "exits.onnx", policy, image_size=32)
    options = {"EnableSubgraph": True}
    quantize_dynamic(path, tmp_path / "int8.onnx", weight_type=QuantType.QUInt8, extra_options=options)
    assert (tmp_path / "int8.onnx").stat().st_size < 0.5 * path.stat().st_size
    branches = branches_of(onnx.load(tmp_path / "int8.onnx").graph)
    quantised = [branch for branch in branches if any(node.op_type == "MatMulInteger" for node in branch.node)]
    assert len(quantised) == model.num_exits - 1  # all but those for the case that no image is left
    session, images = session_of(tmp_path / "int8.onnx"), torch.randn(8, 3, 32, 32)
    expected = model(images, output_hidden_states=True).exit_logits
    for exit in range(model.num_exits):
        thresholds = np.array([2.0] * exit + [0.0] * (model.num_exits - 1 - exit), dtype=np.float32)
        logits, exit_index, _ = session.run(None, {"pixel_values": images.numpy(), "thresholds": thresholds})
        assert (exit_index == exit).all()
        error = (torch.from_numpy(logits) - expected[exit]).abs().max()
        assert 0 < error < 0.05 * expected[exit].abs().max()
