import copy
import json
import pickle
import threading

import pytest
import timm
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hf_selfkd import MultiExitForImageClassification, MultiExitOutput, exit_costs
from hf_selfkd.functional import cross_entropy
from tests.helpers.models import DEIT, SWIN, build_copy
from tests.helpers.versions import checkpoint_activations

BACKBONES = {
    "test_resnet": {},
    "test_vit": {"img_size": 32, "patch_size": 8},
    "test_convnext": {},
    "test_efficientnet": {},
    "swin_tiny_patch4_window7_224": SWIN,  # relative position index, a buffer that is not saved; NHWC maps
    "vit_small_patch16_rope_ape_224": {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 96, "num_heads": 3},
    "deit_tiny_distilled_patch16_224": DEIT,  # two classifiers
}
every_backbone = pytest.mark.parametrize(("name", "kwargs"), BACKBONES.items(), ids=BACKBONES)


def create(name, kwargs, **config):
    return build_copy(MultiExitForImageClassification, name, backbone_kwargs=kwargs, num_labels=5, **config)


def assert_same_state(model, other):
    for kind in ("named_parameters", "named_buffers"):  # non-persistent buffers included
        tensors, others = dict(getattr(model, kind)()), dict(getattr(other, kind)())
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, others[name]), name


@every_backbone
def test_weights_and_logits_are_those_of_plain_timm(name, kwargs):
    model = create(name, kwargs).eval()
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=5, **kwargs).eval()
    assert_same_state(plain, model.backbone)
    images = torch.randn(3, 3, 32, 32)
    output = model(images)
    assert torch.equal(output.logits, plain(images))
    assert output.logits is output.exit_logits[-1]


@every_backbone
def test_saving_and_loading_is_exact(name, kwargs, tmp_path):
    model = create(name, kwargs).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert not list(tmp_path.glob("*.bin"))
    images = torch.randn(3, 3, 32, 32)
    for loader in (MultiExitForImageClassification, AutoModelForImageClassification):
        loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is MultiExitForImageClassification
        assert not any(info.values())
        assert_same_state(model, loaded)
        for logits, expected in zip(loaded(images).exit_logits, model(images).exit_logits, strict=True):
            # weights read from safetensors are memory-mapped and unaligned, so kernels may differ
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@every_backbone
def test_copies_answer_alike(name, kwargs):
    model = create(name, kwargs).eval()
    images = torch.randn(2, 3, 32, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for logits, expected in zip(other(images).exit_logits, model(images).exit_logits, strict=True):
            assert torch.equal(logits, expected)


@every_backbone
def test_gradient_checkpointing_gives_the_same_gradients(name, kwargs):
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    gradients = []
    for checkpointing in (False, True):
        model = create(name, kwargs, small_input_stem=name in ("test_resnet", "test_efficientnet")).train()
        if checkpointing:
            checkpoint_activations(model)
            checkpoint_activations(model, False)
            checkpoint_activations(model)
        torch.manual_seed(1)
        output = model(images)
        sum(cross_entropy(logits, labels) for logits in output.exit_logits).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, checkpointed = gradients
    for name, gradient in plain.items():
        if gradient is not None:
            torch.testing.assert_close(checkpointed[name], gradient, atol=1e-5, rtol=1e-4)
    assert {name for name, gradient in plain.items() if gradient is None} == {
        name for name, gradient in checkpointed.items() if gradient is None
    }


def test_gradient_checkpointing_saves_activations():
    def saved_bytes(model):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.nbytes) or tensor, lambda t: t
        ):
            model(torch.randn(8, 3, 32, 32))
        return sum(kept)

    plain = create("test_vit", BACKBONES["test_vit"]).train()
    checkpointed = create("test_vit", BACKBONES["test_vit"]).train()
    checkpoint_activations(checkpointed)
    assert saved_bytes(checkpointed) < 0.5 * saved_bytes(plain)


@every_backbone
def test_every_parameter_of_the_exits_gets_a_gradient(name, kwargs):
    model = create(name, kwargs, small_input_stem=name in ("test_resnet", "test_efficientnet")).train()
    output = model(torch.randn(4, 3, 32, 32))
    sum(cross_entropy(logits, torch.tensor([0, 1, 2, 3])) for logits in output.exit_logits).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_output(build, batch):
    model = build().train()
    output = model(**batch)
    assert isinstance(output, MultiExitOutput)
    assert [tuple(logits.shape) for logits in output.exit_logits] == [(8, 5)] * 4
    assert [tuple(feature_map.shape[1:]) for feature_map in output.exit_maps] == [
        (32, 32, 32),
        (32, 32, 32),
        (48, 16, 16),
        (192, 8, 8),
        (96, 4, 4),
    ]
    torch.testing.assert_close(output.loss, cross_entropy(output.exit_logits[-1], batch["labels"]))
    model.eval()
    assert model(batch["pixel_values"]).exit_maps is None
    assert len(model(batch["pixel_values"], output_hidden_states=True).exit_maps) == 5
    assert model(batch["pixel_values"]).loss is None
    assert torch.equal(model(**batch, return_dict=False)[1], model(**batch).logits)


def test_maps_that_only_the_scaffold_reads_are_left_out(build, batch):
    model = build().train()
    model.returns_maps = False
    model.scaffold = lambda pixel_values, output: {"maps": (output.exit_maps, output.stage_outputs)}
    output = model(batch["pixel_values"])
    assert all(len(maps) == 5 for maps in output.scaffold["maps"])
    assert output.exit_maps is None and output.stage_outputs is None
    assert "exit_maps" not in output and "stage_outputs" not in output
    assert len(model(batch["pixel_values"], output_hidden_states=True).exit_maps) == 5


def test_the_ensemble_as_the_answer(build, batch):
    model = build(ensemble=True).eval()
    output = model(batch["pixel_values"])
    torch.testing.assert_close(output.logits, torch.stack(output.exit_logits).mean(dim=0))
    assert torch.equal(model.train()(batch["pixel_values"]).logits, model(batch["pixel_values"]).exit_logits[-1])


def test_detached_exits_leave_the_backbone_alone(build, batch):
    model = build().train()
    model.detach_exits = True
    sum(logits.sum() for logits in model(batch["pixel_values"]).exit_logits[:-1]).backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.exits.parameters())


def test_a_frozen_backbone_stays_as_it_is(build, batch):
    model = build()
    model.freeze_backbone()
    before = copy.deepcopy(model.backbone.state_dict())
    model.train()
    assert not model.backbone.training
    assert model.exits.training
    sum(logits.sum() for logits in model(batch["pixel_values"]).exit_logits[:-1]).backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())


def test_the_scaffold_runs_in_training_only_and_is_not_saved(build, batch, tmp_path):
    class Scaffold(torch.nn.Linear):
        def forward(self, pixel_values, output):
            return {"seen": super().forward(output.exit_features[-1])}

    model = build()
    model.scaffold = Scaffold(96, 2)
    assert model.train()(**batch).scaffold["seen"].shape == (8, 2)
    assert model.eval()(**batch).scaffold is None
    model.save_pretrained(tmp_path)
    loaded, info = MultiExitForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert not any(name.startswith("scaffold") for name in loaded.state_dict())


def test_another_number_of_classes_draws_the_classifiers_anew(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="other shapes than the model: .* With ignore_mismatched_sizes=True"):
        MultiExitForImageClassification.from_pretrained(tmp_path, num_labels=7)
    loaded = MultiExitForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert loaded(torch.randn(2, 3, 32, 32)).logits.shape == (2, 7)
    state = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        if tensor.shape == state[name].shape:
            assert torch.equal(tensor, state[name]), name
        elif name.endswith("weight"):
            assert 0.01 < tensor.std() < 1, name


def test_loading_in_half_precision(build, tmp_path):
    build("swin_tiny_patch4_window7_224", backbone_kwargs=SWIN).save_pretrained(tmp_path)
    loaded = MultiExitForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    output = loaded(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16))
    assert all(logits.dtype == torch.bfloat16 and logits.isfinite().all() for logits in output.exit_logits)


def test_from_backbone_keeps_timms_classes_unless_told_otherwise():
    assert MultiExitForImageClassification.from_backbone("test_resnet").config.num_labels == 1000
    model = MultiExitForImageClassification.from_backbone("test_resnet", id2label={0: "cat", 1: "dog"}, num_labels=2)
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert model.backbone.num_classes == 2


def test_from_backbone_takes_a_folder_that_timm_wrote(tmp_path, batch):
    plain = timm.create_model("test_resnet", num_classes=5).eval()
    timm.models.save_for_hf(plain, tmp_path, model_config={"label_names": list("abcde")})
    model = MultiExitForImageClassification.from_backbone(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(model(batch["pixel_values"]).logits, plain(batch["pixel_values"]))
    assert model.config.backbone == "test_resnet"
    assert model.config.id2label == dict(enumerate("abcde"))
    model.save_pretrained(tmp_path / "multi")
    loaded = MultiExitForImageClassification.from_pretrained(tmp_path / "multi")
    assert_same_state(model, loaded)


def test_a_pretrained_classifier_is_not_lost_by_accident():
    with pytest.raises(ValueError, match="the pretrained one would be lost. Pass num_labels"):
        MultiExitForImageClassification.from_backbone("test_resnet", pretrained=True, exit_width=32)
    with pytest.raises(ValueError, match="Pass the number of classes as num_labels"):
        MultiExitForImageClassification.from_backbone("test_resnet", backbone_kwargs={"num_classes": 5})


def test_another_exit_width_puts_a_projection_before_a_new_classifier(build, batch, tmp_path):
    model = build(exit_width=24).eval()
    output = model(batch["pixel_values"])
    assert {features.shape for features in output.exit_features} == {(8, 24)}
    projection, classifier = model.backbone.get_classifier()
    pre_logits = model.backbone.forward_head(model.backbone.forward_features(batch["pixel_values"]), pre_logits=True)
    torch.testing.assert_close(output.exit_features[-1], projection(pre_logits))
    torch.testing.assert_close(output.logits, classifier(projection(pre_logits)))
    model.save_pretrained(tmp_path)
    assert_same_state(model, MultiExitForImageClassification.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnt18", r"Unknown timm model 'resnt18'. Did you mean 'resnet18'"),
        ("no_such_thing_at_all", r"Unknown timm model 'no_such_thing_at_all'"),
    ],
)
def test_unknown_backbone(name, words):
    with pytest.raises(ValueError, match=words):
        MultiExitForImageClassification.from_backbone(name)


def test_a_backbone_without_stages():
    @timm.models.register_model
    def stageless(pretrained=False, **kwargs):
        return torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match="'stageless' has no feature_info, so it cannot be given exits. Choose"):
        MultiExitForImageClassification.from_backbone("stageless")


def test_exit_out_of_range(build):
    with pytest.raises(ValueError) as error:
        build(exits=[1, 7])
    assert str(error.value) == "test_resnet has 5 stages (0 to 4), but exits asks for stage 7."


@pytest.mark.slow
def test_threads_do_not_see_each_others_images(build):
    model = build().eval()
    images = torch.randn(2, 16, 3, 32, 32)
    expected = [model(half).exit_logits for half in images]
    wrong = []

    def work(half):
        for _ in range(20):
            for logits, right in zip(model(images[half]).exit_logits, expected[half], strict=True):
                if not torch.equal(logits, right):
                    wrong.append(half)

    threads = [threading.Thread(target=work, args=(half,)) for half in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_model_may_call_another(build, batch):
    """A teacher inside a student's forward pass sees its own stages."""
    student, teacher = build().eval(), build("test_efficientnet").eval()
    expected = teacher(batch["pixel_values"]).exit_logits

    class Scaffold(torch.nn.Module):
        def forward(self, pixel_values, output):
            return {"logits": teacher(pixel_values).exit_logits}

    student.scaffold = Scaffold()
    seen = student.train()(batch["pixel_values"]).scaffold["logits"]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


@pytest.mark.slow
def test_compiles_without_graph_breaks(build, batch):
    model = build().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for logits, expected in zip(
        compiled(batch["pixel_values"]).exit_logits, model(batch["pixel_values"]).exit_logits, strict=True
    ):
        torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_other_numbers_of_channels(build, name):
    kwargs = {"in_chans": 1} | ({"img_size": 32, "patch_size": 8} if name == "test_vit" else {})
    model = build(name, backbone_kwargs=kwargs).eval()
    assert model.config.pretrained_cfg["input_size"] == [1, 32, 32]
    assert len(model.config.pretrained_cfg["mean"]) == 1
    assert exit_costs(model)[-1] > 0
    assert model(torch.randn(2, 1, 32, 32)).logits.shape == (2, 5)


def test_a_checkpoint_is_all_that_pipeline_needs(build, tmp_path):
    model = build(id2label={index: f"class {index}" for index in range(5)}).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    image = Image.effect_noise((50, 40), 100).convert("RGB")
    predictions = pipeline("image-classification", model=str(tmp_path))(image, top_k=5)
    assert {prediction["label"] for prediction in predictions} == set(model.config.id2label.values())
    pixel_values = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"]
    probabilities = model(pixel_values).logits.softmax(dim=1)[0]
    for prediction in predictions:
        index = int(prediction["label"].removeprefix("class "))
        assert prediction["score"] == pytest.approx(probabilities[index].item(), abs=1e-5)
