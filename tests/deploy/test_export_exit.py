import onnx
import onnxruntime
import pytest
import torch

from hf_selfkd import export_exit, export_exits
from hf_selfkd.deploy.export_exit import StaticExit

NAMES = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"]


@torch.no_grad()
def exit_logits(model, images, exit):
    return model(images).exit_logits[exit]


@pytest.mark.parametrize("name", NAMES)
def test_a_static_exit_has_the_same_logits_and_no_later_layers(build, name):
    model, images = build(name).eval(), torch.randn(3, 3, 32, 32)
    for exit in range(model.num_exits):
        static = StaticExit(model, exit)
        torch.testing.assert_close(static(images), exit_logits(model, images, exit))
        static(images).sum().backward()
        assert all(parameter.grad is not None for parameter in static.parameters())  # nothing that is not needed


@pytest.mark.parametrize("exit", [0, 3])
def test_a_torch_program(build, tmp_path, exit):
    model = build().eval()
    path = export_exit(model, exit, tmp_path / "exit.pt2", format="torch", image_size=32)
    program = torch.export.load(path)
    for count in (1, 5):
        images = torch.randn(count, 3, 32, 32)
        torch.testing.assert_close(program.module()(images), exit_logits(model, images, exit))
    names = " ".join(program.state_dict)
    assert ("layer2" in names) == ("fc" in names) == (exit == 3)
    convolutions = [node for node in program.graph.nodes if "conv2d" in str(node.target)]
    everything = [module for module in model.backbone.modules() if isinstance(module, torch.nn.Conv2d)]
    assert (len(convolutions) == len(everything)) == (exit == 3)


@pytest.mark.slow
def test_an_onnx_file(build, tmp_path):
    model = build().train()  # exported in eval mode, and left as it was
    path = export_exit(model, exit=1, path=tmp_path / "exit.onnx", image_size=32)
    assert model.training
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    model.eval()
    for count in (1, 2, 7):
        images = torch.randn(count, 3, 32, 32)
        (logits,) = session.run(["logits"], {"pixel_values": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), exit_logits(model, images, 1), atol=1e-4, rtol=1e-4)
    stored = sum(torch.Size(tensor.dims).numel() for tensor in onnx.load(path).graph.initializer)
    needed = sum(parameter.numel() for parameter in StaticExit(model, 1).parameters())
    assert stored <= 1.05 * needed < 0.5 * sum(parameter.numel() for parameter in model.parameters())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["exit.onnx"]


def test_errors(build, tmp_path):
    model = build().eval()
    with pytest.raises(ValueError, match="test_resnet has 4 exits .0 to 3., but got exit=4."):
        export_exit(model, 4, tmp_path / "exit.onnx")
    with pytest.raises(ValueError, match="format must be one of onnx, torch, but got 'tflite'."):
        export_exit(model, 0, tmp_path / "exit.tflite", format="tflite")
    with pytest.raises(ValueError, match="A torch program needs a path that ends in .pt2, but got"):
        export_exit(model, 0, tmp_path / "exit.onnx", format="torch")


def test_all_exits_by_name(build, tmp_path):
    model = build().eval()
    path = export_exits(model, tmp_path / "exits.onnx", image_size=32)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert names == ["logits_0", "logits_1", "logits_2", "logits_3", "ensemble"]
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = model(images).exit_logits
    *found, ensemble = (torch.from_numpy(output) for output in session.run(names, {"pixel_values": images.numpy()}))
    torch.testing.assert_close(found, [*expected], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ensemble, torch.stack(expected).mean(dim=0), atol=1e-4, rtol=1e-4)
