import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close
from transformers import AutoModelForImageClassification

from hf_selfkd import MultiExitOutput, get_method
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
    },
}
BACKBONES = [
    {"backbone": "test_resnet"},
    {"backbone": "test_vit"},
    {"backbone": "test_convnext"},
    {"backbone": "test_efficientnet"},
    SWIN,
]


def name_of(config):
    return config["backbone"]


@pytest.fixture
def build_with_teacher(build):
    """Build a model with its self-teacher, in training mode, and the method."""

    def build_with_teacher(method=None, **config):
        method = method or get_method("frskd")
        model = build(**config)
        model.detach_exits = method.detach_exits
        model.scaffold = method.scaffold(model)
        return model.train(), method

    return build_with_teacher


def output_of_vectors(inputs):
    return MultiExitOutput(
        exit_logits=(inputs["student_logits"],),
        scaffold={
            "logits": inputs["teacher_logits"],
            "student_maps": inputs["student_maps"],
            "teacher_maps": inputs["teacher_maps"],
        },
    )


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=True)


# Numbers


def test_total_of_the_vectors(vector):
    inputs, expected = vector("frskd.total")
    terms = get_method("frskd")(output_of_vectors(inputs), inputs["labels"], 0.0)
    assert list(terms) == ["label", "teacher", "logit", "attention"]
    assert_close(sum(terms.values()), expected, atol=1e-5, rtol=0)


def test_soft_labels_of_the_vectors(vector):
    inputs, expected = vector("frskd.kd_T4")
    terms = get_method("frskd", alpha=1)(output_of_vectors(inputs), inputs["labels"], 0.0)
    assert_close(terms["logit"], expected, atol=1e-5, rtol=0)


def test_attention_of_the_vectors(vector):
    inputs, expected = vector("frskd.at_loss_levels")
    terms = get_method("frskd", beta=1)(output_of_vectors(inputs), inputs["labels"], 0.0)
    assert_close(terms["attention"], expected.sum(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("of", ["teacher", "student"])
def test_gradients_of_the_vectors(vector, of):
    inputs, expected = vector(f"frskd.grad_{of}_logits")
    logits = inputs[f"{of}_logits"].requires_grad_()
    terms = get_method("frskd")(output_of_vectors(inputs), inputs["labels"], 0.0)
    sum(terms.values()).backward()
    assert_close(logits.grad, expected, atol=1e-5, rtol=0)


# Gradients of teacher and student


def test_distillation_never_updates_the_self_teacher(build_with_teacher, batch):
    model, method = build_with_teacher()
    terms = method(model(batch["pixel_values"]), batch["labels"], 0.0)
    assert all(term.isfinite() for term in terms.values())
    for name in ("label", "logit", "attention"):
        assert not any(grad is not None for grad in gradients(terms[name], list(model.scaffold.parameters()))), name


def test_label_loss_of_the_self_teacher_reaches_the_backbone_but_not_its_classifier(build_with_teacher, batch):
    model, method = build_with_teacher()
    terms = method(model(batch["pixel_values"]), batch["labels"], 0.0)
    first, last = next(model.backbone.parameters()), model.backbone.get_classifier().weight
    reached, not_reached = gradients(terms["teacher"], [first, last])
    assert reached.abs().sum() > 0
    assert not_reached is None
    attended, classified = gradients(terms["attention"], [first, last])
    assert attended.abs().sum() > 0
    assert classified is None
    assert all(grad.abs().sum() > 0 for grad in gradients(terms["logit"], [first, last]))


def test_unlabelled_images_are_still_distilled(build_with_teacher, batch):
    model, method = build_with_teacher()
    terms = method(model(batch["pixel_values"]), torch.full_like(batch["labels"], -100), 0.0)
    assert terms["label"] == terms["teacher"] == 0
    assert terms["logit"] > 0 and terms["attention"] > 0


# Backbones


@pytest.mark.parametrize("config", BACKBONES, ids=name_of)
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_every_parameter_gets_a_gradient(build_with_teacher, batch, config, batch_size):
    model, method = build_with_teacher(**config)
    labels, images = batch["labels"][:batch_size], batch["pixel_values"][:batch_size]
    if config["backbone"] == "test_convnext":  # its last map of a 32-pixel image is a single pixel
        images = torch.nn.functional.interpolate(images, scale_factor=2)
    output = model(images)
    terms = method(output, labels, 0.0)
    exits = sum(torch.nn.functional.cross_entropy(logits, labels) for logits in output.exit_logits[:-1])
    (sum(terms.values()) + exits).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for student, teacher in zip(output.scaffold["student_maps"], output.scaffold["teacher_maps"], strict=True):
        assert student.shape[2:] == teacher.shape[2:]
        assert teacher.shape[1] == 2 * student.shape[1]


@pytest.mark.parametrize("config", BACKBONES, ids=name_of)
def test_evaluation_never_runs_the_self_teacher(build_with_teacher, batch, config):
    model, _ = build_with_teacher(**config)
    model.eval()
    model.scaffold.register_forward_pre_hook(lambda *args: pytest.fail("the self-teacher ran"))
    with_teacher = model(batch["pixel_values"])
    model.scaffold = None
    assert torch.equal(with_teacher.logits, model(batch["pixel_values"]).logits)
    assert with_teacher.scaffold is None


@pytest.mark.parametrize(
    ("config", "stages"),
    [
        ({"backbone": "test_resnet"}, [1, 2, 3, 4]),
        ({"backbone": "test_resnet", "small_input_stem": False}, [1, 2, 3, 4]),
        ({"backbone": "test_convnext"}, [0, 1, 2, 3]),
        (SWIN, [0, 1, 2, 3]),
    ],
    ids=["resnet", "resnet stock stem", "convnext", "swin"],
)
def test_stages_of_hierarchical_backbones(build_with_teacher, config, stages):
    model, _ = build_with_teacher(**config)
    assert model.scaffold.stages == stages


def test_reads_the_feature_maps_of_the_model(build_with_teacher, batch):
    model, _ = build_with_teacher(**SWIN)
    output = model(batch["pixel_values"])
    maps = model.backbone.forward_intermediates(batch["pixel_values"], intermediates_only=True)
    for stage, student in zip(model.scaffold.stages, output.scaffold["student_maps"], strict=True):
        assert student.shape == maps[stage].shape
        assert student is output.exit_maps[stage]


# Segmentation


@pytest.fixture
def dense(build_segmenter):
    """Return a segmentation model with its self-teacher, two images and their label maps."""
    model = build_segmenter()
    model.scaffold = get_method("frskd").scaffold(model)
    labels = torch.randint(0, 5, (2, 32, 48))
    labels[0, :10] = -100
    return model, torch.randn(2, 3, 32, 48), labels


def test_terms_of_segmentation_are_those_of_the_paper(dense):
    model, images, labels = dense
    output = model(images)
    student, teacher = (
        torch.nn.functional.interpolate(logits, size=(32, 48), mode="bilinear", align_corners=False)
        for logits in (output.logits, output.scaffold["logits"])
    )
    terms = get_method("frskd", mask_void=False)(output, labels, 59.0)
    for name, logits in (("label", student), ("teacher", teacher)):
        per_image = [torch.nn.functional.cross_entropy(logits[i : i + 1], labels[i : i + 1]) for i in range(2)]
        assert_close(terms[name], sum(per_image) / 2)
    divergence = teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))
    assert_close(terms["logit"], divergence.sum() / (2 * 32 * 48))
    attention = 0.0
    for own, refined in zip(output.exit_maps, output.scaffold["teacher_maps"], strict=True):
        own, refined = (level.square().mean(1).flatten(1) for level in (own, refined))
        unit = own / own.norm(dim=1, keepdim=True) - refined / refined.norm(dim=1, keepdim=True)
        attention += unit.square().mean()
    assert_close(terms["attention"], 50 * attention)


def test_ignored_pixels_are_excluded_from_the_soft_labels(dense):
    model, images, labels = dense
    output = model(images)
    terms = get_method("frskd")(output, labels, 59.0)
    logits = [logits.detach().clone() for logits in (output.logits, output.scaffold["logits"])]
    student, teacher = (
        torch.nn.functional.interpolate(each, size=(32, 48), mode="bilinear", align_corners=False) for each in logits
    )
    divergence = (teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1)
    assert_close(terms["logit"], (divergence[0, 10:].mean() + divergence[1].mean()) / 2)


def test_ramp_of_segmentation(dense, vector):
    model, images, labels = dense
    inputs, expected = vector("frskd.seg_ramp")
    output, method = model(images), get_method("frskd")
    full = method(output, labels, 60.0)
    for epoch, ramp in zip(inputs["epochs"].tolist(), expected, strict=True):
        terms = method(output, labels, epoch + 0.7)
        for name in ("logit", "attention"):
            assert_close(terms[name], ramp * full[name], atol=1e-4, rtol=1e-4)
        assert terms["label"] == full["label"] and terms["teacher"] == full["teacher"]


def test_classification_has_a_ramp_only_if_asked(vector):
    inputs, _ = vector("frskd.total")
    output = output_of_vectors(inputs)
    plain, ramped = get_method("frskd"), get_method("frskd", ramp_start=2, ramp_end=4)
    assert plain(output, inputs["labels"], 0.0)["logit"] > 0
    assert ramped(output, inputs["labels"], 1.9)["logit"] == 0
    assert ramped(output, inputs["labels"], 3.0)["logit"] == plain(output, inputs["labels"], 0.0)["logit"]


def test_distillation_never_updates_the_self_teacher_of_segmentation(dense):
    model, images, labels = dense
    terms = get_method("frskd")(model(images), labels, 59.0)
    own = list(model.scaffold.parameters())
    for name in ("label", "logit", "attention"):
        assert not any(grad is not None for grad in gradients(terms[name], own)), name
    assert all(grad is not None for grad in gradients(terms["teacher"], own))
    assert gradients(terms["teacher"], [next(model.backbone.parameters())])[0].abs().sum() > 0
    assert gradients(terms["teacher"], list(model.head.parameters())) == (None,) * 6


# Running


def test_autocast_keeps_softmax_and_attention_in_float32(build_with_teacher, batch):
    model, method = build_with_teacher()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch["pixel_values"])
        terms = method(output, batch["labels"], 0.0)
    assert output.scaffold["logits"].dtype == output.scaffold["teacher_maps"][0].dtype == torch.bfloat16
    as_float = MultiExitOutput(
        exit_logits=[logits.float() for logits in output.exit_logits],
        scaffold={
            name: value.float() if name == "logits" else [level.float() for level in value]
            for name, value in output.scaffold.items()
        },
    )
    for name, term in method(as_float, batch["labels"], 0.0).items():
        assert terms[name].dtype == torch.float32
        assert_close(terms[name], term)


def test_gradient_checkpointing_changes_nothing(build_with_teacher, batch):
    found = []
    for checkpointing in (False, True):
        model, method = build_with_teacher()
        if checkpointing:
            checkpoint_activations(model)
        terms = method(model(batch["pixel_values"]), batch["labels"], 0.0)
        sum(terms.values()).backward()
        found.append((terms, next(model.backbone.parameters()).grad))
    assert_close(found[1], found[0])


@pytest.mark.slow
@pytest.mark.parametrize("config", BACKBONES, ids=name_of)
def test_compiles_as_one_graph(build_with_teacher, batch, config):
    model, method = build_with_teacher(**config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    terms = [method(run(batch["pixel_values"]), batch["labels"], 0.0) for run in (model, compiled)]
    assert_close(terms[1], terms[0], atol=1e-4, rtol=1e-4)


def test_trains_and_ships_without_the_self_teacher(build, train, tmp_path, batch):
    trainer = train(build(), "frskd")
    logs = trainer.state.log_history[0]
    terms = [logs[f"loss/{name}"] for name in ("label", "teacher", "logit", "attention", "exits")]
    assert sum(terms) == pytest.approx(logs["loss"], abs=1e-3)
    trainer.save_model(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert not any("scaffold" in name for name in file.keys())
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    assert_close(loaded(batch["pixel_values"]).logits, trainer.model.eval()(batch["pixel_values"]).logits)


def test_needs_its_self_teacher(build, batch):
    output = build().train()(batch["pixel_values"])
    with pytest.raises(ValueError) as error:
        get_method("frskd")(output, batch["labels"], 0.0)
    assert str(error.value) == (
        "FRSKD was called without its self-teacher. Train with SelfDistillationTrainer, "
        "or set model.scaffold = method.scaffold(model)."
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": -1}, "FRSKD needs alpha >= 0, but got alpha=-1."),
        ({"beta": -0.5}, "FRSKD needs beta >= 0, but got beta=-0.5."),
        ({"temperature": 0}, "FRSKD needs temperature > 0, but got temperature=0."),
        ({"width_multiplier": 0}, "FRSKD needs width_multiplier > 0, but got width_multiplier=0."),
        ({"ramp_start": 3, "ramp_end": 3}, "FRSKD needs ramp_end > 3, but got ramp_end=3."),
        (
            {"ramp_start": 3},
            "FRSKD needs ramp_start and ramp_end together, but got ramp_start=3 and ramp_end=None.",
        ),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ValueError) as error:
        get_method("frskd", **values)
    assert str(error.value) == message
