import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline

from hf_selfkd import MultiExitConfig, MultiExitForSemanticSegmentation, get_method
from tests.helpers.versions import checkpoint_activations

SWIN = {
    "backbone": "swin_tiny_patch4_window7_224",
    "backbone_kwargs": {
        "img_size": 32,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 4, 8],
        "drop_path_rate": 0.0,
        "strict_img_size": False,
    },
}
BACKBONES = [
    {"backbone": "test_resnet"},
    {"backbone": "test_convnext"},
    {"backbone": "test_efficientnet"},
    {"backbone": "mobilenetv3_small_050"},
    SWIN,
]


def name_of(config):
    return config["backbone"]


@pytest.fixture
def images():
    return torch.randn(2, 3, 70, 101)


@pytest.fixture
def labels():
    labels = torch.randint(0, 5, (2, 70, 101))
    labels[0, :20] = 255
    return labels


# The model


@pytest.mark.parametrize("config", BACKBONES, ids=name_of)
@pytest.mark.slow
def test_any_backbone_and_any_image_size(build_segmenter, images, labels, config):
    model = build_segmenter(**config)
    output = model(images, labels)
    assert model.num_exits == len(output.exit_logits) == 4
    assert all(logits.shape == output.logits.shape for logits in output.exit_logits)
    assert output.logits is output.exit_logits[-1]
    assert output.logits.shape == (2, 5, 35, 51) if config is SWIN else (2, 5, 18, 26)
    assert len(output.exit_maps) == model.num_levels == 6
    output.loss.backward()


@pytest.mark.parametrize("config", BACKBONES, ids=name_of)
@pytest.mark.parametrize("method", ["none", "deep_supervision", "frskd"])
def test_every_parameter_gets_a_gradient(build_segmenter, images, labels, config, method):
    method = get_method(method)
    model = build_segmenter(**config)
    model.scaffold, model.detach_exits = method.scaffold(model), method.detach_exits
    output = model(images)
    terms = method(output, labels.masked_fill(labels == 255, -100), 0.0)  # before the ramp of frskd
    exits = sum(logits.square().mean() for logits in output.exit_logits[:-1])
    (sum(terms.values()) + exits).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_loss_ignores_void_and_interpolates(build_segmenter, images, labels):
    model = build_segmenter().eval()
    output = model(images, labels)
    logits = F.interpolate(output.logits, size=(70, 101), mode="bilinear", align_corners=False)
    per_image = [F.cross_entropy(logits[i : i + 1], labels[i : i + 1], ignore_index=255) for i in range(2)]
    assert_close(output.loss, sum(per_image) / 2)
    other = build_segmenter(semantic_loss_ignore_index=0).eval()
    ignored = torch.zeros_like(labels)
    assert other(images, ignored).loss == 0
    assert_close(model(images, labels.masked_fill(labels == 255, -100)).loss, output.loss)


def test_logits_are_those_of_pyramid_and_head(build_segmenter, images):
    model = build_segmenter().eval()
    maps = model.backbone.forward_intermediates(F.pad(images, (0, 27, 0, 26)), intermediates_only=True)
    levels = [maps[stage] for stage in (1, 2, 3, 4)]  # the stem left out
    for _ in range(2):
        height, width = levels[-1].shape[2:]
        levels.append(F.max_pool2d(levels[-1], 3, 2, padding=(height % 2, width % 2), ceil_mode=True))
    assert model.levels == [1, 2, 3, 4]
    expected = model.head(model.pyramid(levels))
    assert expected.shape[2:] == (24, 32)
    output = model(images, output_hidden_states=True)
    assert_close(output.logits, expected[:, :, :18, :26])
    assert_close(output.exit_maps, model.pyramid(levels))
    stage = model.exit_stages[1]
    exit_logits = F.interpolate(model.exits[1](maps[stage]), size=(24, 32), mode="bilinear", align_corners=False)
    assert_close(output.exit_logits[1], exit_logits[:, :, :18, :26])


def test_size_that_needs_no_padding_is_left_alone(build_segmenter):
    model = build_segmenter().eval()
    images = torch.randn(1, 3, 64, 96)
    assert model(images).logits.shape == (1, 5, 16, 24)
    larger = F.pad(images, (0, 32))
    assert model(larger).logits.shape == (1, 5, 16, 32)
    # Padding by hand is what an image of 90 columns gets.
    cut = images[..., :90]
    assert_close(model(cut).logits, model(F.pad(cut, (0, 6))).logits[..., :23])


def test_detached_exits_leave_the_backbone_alone(build_segmenter, images):
    model = build_segmenter()
    model.detach_exits = True
    sum(logits.sum() for logits in model(images).exit_logits[:-1]).backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.exits.parameters())


def test_maps_that_only_the_scaffold_reads_are_left_out(build_segmenter, images):
    model = build_segmenter()
    model.returns_maps = False
    model.scaffold = lambda pixel_values, output: {"maps": output.exit_maps}
    output = model(images)
    assert len(output.scaffold["maps"]) == 6 and "exit_maps" not in output
    assert len(model(images, output_hidden_states=True).exit_maps) == 6


def test_ensemble_is_the_mean_of_all_exits_in_evaluation(build_segmenter, images, labels):
    model = build_segmenter(ensemble=True)
    output = model.eval()(images, labels)
    assert_close(output.logits, torch.stack(output.exit_logits).mean(dim=0))
    training = model.train()(images)
    assert training.logits is training.exit_logits[-1]


def test_choice_of_exits(build_segmenter, images):
    assert build_segmenter(exits=[]).num_exits == 1
    assert len(build_segmenter(exits=[2])(images).exit_logits) == 2


@pytest.mark.slow
def test_compiles_as_one_graph(build_segmenter, images, labels):
    model = build_segmenter()
    model.scaffold = get_method("frskd").scaffold(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(images, labels).loss, model(images, labels).loss, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing(build_segmenter, images, labels):
    found = []
    for checkpointing in (False, True):
        model = build_segmenter()
        if checkpointing:
            checkpoint_activations(model)
        loss = model(images, labels).loss
        loss.backward()
        found.append((loss, next(model.backbone.parameters()).grad))
    assert_close(found[1], found[0])


# Saving


@pytest.mark.parametrize("config", [BACKBONES[0], SWIN], ids=name_of)
def test_save_and_load(build_segmenter, images, tmp_path, config):
    model = build_segmenter(**config)
    model.scaffold = get_method("frskd").scaffold(model)
    model(images)  # moves the batch-norm statistics
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert type(loaded) is MultiExitForSemanticSegmentation
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("scaffold.")}
    assert kept.keys() == loaded.state_dict().keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in loaded.state_dict().items())
    for logits, expected in zip(loaded(images).exit_logits, model(images).exit_logits, strict=True):
        assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_checkpoint_carries_its_code_and_its_processor(build_segmenter, tmp_path):
    model = build_segmenter()
    model.config.pretrained_cfg |= {"input_size": [3, 48, 64], "mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration.MultiExitConfig",
        "AutoModelForSemanticSegmentation": "modeling_segmentation.MultiExitForSemanticSegmentation",
    }
    assert {"modeling_segmentation.py", "modeling_base.py", "pyramid.py", "configuration.py"} <= {
        path.name for path in tmp_path.iterdir()
    }
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    values = processor(Image.new("RGB", (100, 80), (255, 255, 255)), return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 3, 48, 64)
    assert_close(values[0, :, 0, 0], torch.tensor([0.6 / 0.1, 0.5 / 0.2, 0.4 / 0.3]))


def test_pipeline_and_post_processing_answer_in_the_size_of_the_image(build_segmenter, tmp_path, caplog):
    model = build_segmenter(id2label=dict(enumerate("abcde"))).eval()
    model.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (61, 93, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    segments = pipeline("image-segmentation", model=str(tmp_path))(image)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        output = model(**processor(image, return_tensors="pt"))
    segmented = processor.post_process_semantic_segmentation(output, target_sizes=[(61, 93)])[0]
    assert segmented.shape == (61, 93)
    assert {segment["label"] for segment in segments} == {"abcde"[index] for index in segmented.unique()}
    for segment in segments:
        assert segment["mask"].size == (93, 61)
        expected = (segmented == "abcde".index(segment["label"])).numpy()
        assert (np.array(segment["mask"]) == 255 * expected).mean() > 0.999  # kernels may differ in the last bit
    assert "not supported" not in caplog.text


# Bad input


def test_isotropic_backbone(build_segmenter):
    with pytest.raises(ValueError, match="all stages of test_vit return 4x4. Choose one such as resnet18"):
        build_segmenter("test_vit", backbone_kwargs={"img_size": 32, "patch_size": 8})


@pytest.mark.parametrize(
    ("field", "value"), [("exit_width", 32), ("early_exit", True), ("exit_policy", {"criterion": "confidence"})]
)
def test_fields_of_classification(field, value):
    with pytest.raises(ValueError, match=f"{field} is for image classification, but got {field}="):
        MultiExitForSemanticSegmentation(MultiExitConfig(backbone="test_resnet", num_labels=5, **{field: value}))


@pytest.mark.parametrize("width", [0, 1.5, True])
def test_pyramid_width_is_an_integer(width):
    with pytest.raises(ValueError, match="pyramid_width must be an integer from 1 to 65,536, but got"):
        MultiExitConfig(backbone="test_resnet", pyramid_width=width)


def test_labels_of_another_size(build_segmenter, images):
    with pytest.raises(ValueError, match=r"label map of \(18, 26\) pixels, but an image of \(70, 101\)"):
        build_segmenter()(images, torch.zeros(2, 18, 26, dtype=torch.long))


@pytest.mark.parametrize("wrong", [5, 254, -1])
def test_class_out_of_range(build_segmenter, images, labels, wrong):
    labels[1, 3, 4] = wrong
    with pytest.raises(
        ValueError, match=f"has a pixel of class {wrong}, but the model has 5 classes .0 to 4. and ignores 255"
    ):
        build_segmenter()(images, labels)


def test_no_labelled_pixel_gives_loss_zero(build_segmenter, images, labels):
    model = build_segmenter()
    loss = model(images, torch.full_like(labels, 255)).loss
    loss.backward()
    assert loss == 0
    assert all(parameter.grad.isfinite().all() for parameter in model.backbone.parameters())


@pytest.mark.parametrize("method", ["byot", "eed"])
def test_methods_for_classification_only(build_segmenter, method):
    with pytest.raises(ValueError, match="Methods for image-segmentation: deep_supervision, frskd, none"):
        get_method(method).check(build_segmenter())


def test_number_of_classes_goes_to_num_labels():
    with pytest.raises(ValueError, match="num_labels, not in backbone_kwargs"):
        MultiExitForSemanticSegmentation.from_backbone("test_resnet", num_labels=5, backbone_kwargs={"num_classes": 5})


def test_a_size_that_the_backbone_does_not_take_is_named(build_segmenter):
    fields = SWIN | {"backbone_kwargs": SWIN["backbone_kwargs"] | {"strict_img_size": True}}
    with pytest.raises(
        ValueError, match="does not take images of 48x64 pixels: .*'img_size': .48, 64..*strict_img_size"
    ):
        build_segmenter(**fields).eval()(torch.randn(1, 3, 40, 56))


def test_a_single_small_image_cannot_train(build_segmenter):
    model = build_segmenter()
    with pytest.raises(ValueError, match="cannot train on a single image of 64x64 pixels, whose coarsest feature map"):
        model(torch.randn(1, 3, 64, 64))
    assert model(torch.randn(2, 3, 64, 64)).logits.isfinite().all()
    assert model.eval()(torch.randn(1, 3, 64, 64)).logits.isfinite().all()
