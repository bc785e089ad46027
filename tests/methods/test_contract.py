"""Properties of every method: on every kind of backbone, in every way of training."""

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForImageClassification

from hf_selfkd import Method, get_method
from hf_selfkd.functional import add
from tests.helpers.methods import FOLDER, METHODS

SWIN = {
    "embed_dim": 16,
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 4, 8),
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "drop_path_rate": 0.0,  # or two passes would differ
}
BACKBONES = {
    "test_resnet": {},
    "test_vit": {},
    "test_convnext": {},
    "test_efficientnet": {},
    "swin_tiny_patch4_window7_224": {"backbone_kwargs": SWIN},
}


def arguments(name):
    """Return the arguments that a method requires."""
    torch.manual_seed(1)
    needed = {"kd": {"teacher": timm.create_model("test_resnet", num_classes=5)}, "ps_kd": {"ramp_epochs": 3}}
    return needed.get(name, {})


def on_backbones(*fast, marks=((), pytest.mark.slow)):
    """Run a test for every method on every backbone, with the first of the marks on those in ``fast``."""
    cells = [
        pytest.param(name, backbone, marks=marks[backbone not in fast], id=f"{name}-{backbone}")
        for name in METHODS
        for backbone in BACKBONES
    ]
    return pytest.mark.parametrize(("name", "backbone"), cells)


@pytest.fixture
def prepared(build, batch):
    """Return a method and a model that is ready to train with it, as the trainer makes it."""

    def prepared(name, backbone, **config):
        method, model = get_method(name, **arguments(name)), build(backbone, **(BACKBONES[backbone] | config))
        torch.manual_seed(0)
        method.attach(model, num_images=len(batch["labels"]))
        with torch.no_grad():
            method.prepare(model.eval(), [batch])
            method.remember(predict(model.train(), batch))
        return method, model

    return prepared


def predict(model, batch):
    """Return the output as the trainer passes it to a method; images are numbered from 0 to 7."""
    output = model(batch["pixel_values"])
    output.sample_indices = torch.arange(len(batch["labels"])) % 8
    return output


def loss_terms(method, model, batch, epoch=1.5):
    return method.terms(predict(model, batch), batch["labels"], epoch)


def gradients(model, terms):
    model.zero_grad()
    add(terms.values()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_trains(method, model, batch):
    terms = loss_terms(method, model, batch)
    assert terms and all(isinstance(name, str) for name in terms)
    for name, term in terms.items():
        assert term.shape == () and term.dtype == torch.float32 and term.isfinite(), name
    grads = gradients(model, terms)
    assert [name for name, grad in grads.items() if grad is None] == []
    assert all(grad.isfinite().all() for grad in grads.values())


def test_every_file_of_the_folder_is_a_method_or_serves_methods():
    serving = {"base", "combination", "registry"}
    serving |= {"averaged_teacher", "decoupled", "hash_layer", "predictions", "self_teacher", "students", "teacher"}
    serving |= {"customized_labels", "teacher_match", "weak_classifier"}
    assert {path.stem for path in FOLDER.glob("[!_]*.py")} == set(METHODS) | serving


@pytest.mark.parametrize("name", METHODS)
def test_name_paper_and_hyper_parameters(name):
    method = get_method(name, **arguments(name))
    assert method.name == name == type(method).__module__.rpartition(".")[2]
    assert method.paper.startswith("https://arxiv.org/abs/")
    assert get_method(**method.to_dict()) == method
    assert list(method.to_dict())[0] == "name"


@on_backbones(*BACKBONES)
def test_terms_are_finite_and_every_parameter_gets_a_gradient(prepared, batch, name, backbone):
    check_trains(*prepared(name, backbone), batch)


@on_backbones("test_resnet", "test_vit")
def test_bfloat16(prepared, batch, name, backbone):
    # The stock stem, because convolutions of large feature maps in bfloat16 are slow on a CPU.
    method, model = prepared(name, backbone, small_input_stem=False)
    if name == "lsh":
        method = replace(method, correct_only=False)  # which images are classified correctly may hang on the rounding
    exact = {key: term.detach() for key, term in loss_terms(method, model, batch).items()}
    with torch.autocast("cpu", torch.bfloat16):
        check_trains(method, model, batch)
        rounded = loss_terms(method, model, batch)
    total = add(exact.values())
    assert (add(rounded.values()) - total).abs() < 0.05 * total


@on_backbones("test_convnext", "test_vit")
def test_a_batch_of_one(prepared, batch, name, backbone):
    method, model = prepared(name, backbone)
    one = {key: tensor[:1] for key, tensor in batch.items()}
    if "img_size" not in model.config.backbone_kwargs:
        # Batch norm needs two pixels per feature map.
        one["pixel_values"] = F.interpolate(one["pixel_values"], scale_factor=4)
    check_trains(method, model, one)


@on_backbones("test_resnet", "test_vit")
def test_gradient_checkpointing_changes_nothing(prepared, batch, name, backbone):
    method, model = prepared(name, backbone)
    plain_terms = loss_terms(method, model, batch)
    plain = gradients(model, plain_terms)
    plain = {name: grad.clone() for name, grad in plain.items()}
    model.backbone.set_grad_checkpointing(True)
    terms = loss_terms(method, model, batch)
    torch.testing.assert_close(terms, plain_terms, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradients(model, terms), plain, atol=1e-6, rtol=1e-4)


def builds_scaffold(name):
    return type(get_method(name, **arguments(name))).scaffold is not Method.scaffold


# Without a scaffold the graph is that of byot for all methods.
@pytest.mark.parametrize(
    "name",
    [
        *("byot", "frskd"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if builds_scaffold(name) and name != "frskd"),
    ],
)
@pytest.mark.slow
def test_one_graph_under_compile(prepared, batch, name):
    # Two blocks, because tracing takes the time.
    method, model = prepared(name, "test_vit", backbone_kwargs={"img_size": 32, "patch_size": 8, "depth": 2})
    expected = loss_terms(method, model, batch)
    torch._dynamo.reset()
    forward, model.forward = model.forward, torch.compile(model.forward, backend="eager", fullgraph=True)
    try:
        terms = loss_terms(method, model, batch)
    finally:
        model.forward = forward
    torch.testing.assert_close(terms, expected, atol=1e-5, rtol=1e-5)
    assert None not in gradients(model, terms).values()


@on_backbones("test_resnet", "test_vit", marks=(pytest.mark.slow, pytest.mark.exhaustive))
def test_compiled_gradients_are_the_same(prepared, batch, name, backbone):
    method, model = prepared(name, backbone)
    expected = {key: grad.clone() for key, grad in gradients(model, loss_terms(method, model, batch)).items()}
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="aot_eager")
    torch.testing.assert_close(gradients(model, loss_terms(method, model, batch)), expected, atol=1e-5, rtol=1e-3)


@on_backbones("test_resnet")
def test_labels_may_be_probabilities(prepared, batch, name, backbone):
    method, model = prepared(name, backbone)
    output = predict(model, batch)
    certain = F.one_hot(batch["labels"], 5).float()
    indexed, probable = (method(output, labels, 1.5) for labels in (batch["labels"], certain))
    torch.testing.assert_close(probable, indexed)
    mixed = method(output, 0.7 * certain + 0.3 * certain.flip(0), 1.5)
    assert mixed.keys() == indexed.keys() and all(term.isfinite() for term in mixed.values())
    assert not torch.isclose(add(mixed.values()), add(indexed.values()))


@on_backbones("test_resnet", "test_vit")
def test_seeing_every_image_twice_changes_nothing(prepared, batch, name, backbone):
    method, model = prepared(name, backbone)
    doubled = {key: torch.cat([tensor, tensor]) for key, tensor in batch.items()}
    once, twice = loss_terms(method, model, batch), loss_terms(method, model, doubled)
    torch.testing.assert_close(twice, once, atol=1e-5, rtol=1e-4)


@on_backbones("test_resnet")
def test_scaffolds_are_not_saved(prepared, batch, tmp_path, name, backbone):
    method, model = prepared(name, backbone)
    model.eval()
    with torch.no_grad():
        output = model(batch["pixel_values"])
        assert output.scaffold is None
        model.save_pretrained(tmp_path)
        model.scaffold = None
        for bare, logits in zip(model(batch["pixel_values"]).exit_logits, output.exit_logits, strict=True):
            assert torch.equal(bare, logits)
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            assert set(file.keys()) == model.state_dict().keys()
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(batch["pixel_values"]).logits, output.logits, atol=1e-5, rtol=1e-5)


@on_backbones("test_resnet")
def test_one_step_of_the_trainer_logs_terms_that_add_up(build, train, name, backbone):
    model = build(backbone, **BACKBONES[backbone])
    ends = [next(model.backbone.parameters()), *(part.weight for part in model.classifiers)]
    ends += [head.classifier.weight for head in model.exits]
    before = [weight.detach().clone() for weight in ends]
    log = train(model, get_method(name, **arguments(name)), max_steps=1).state.log_history[0]
    terms = {key: value for key, value in log.items() if key.startswith("loss/")}
    assert terms and sum(terms.values()) == pytest.approx(log["loss"], abs=1e-4)
    assert not any(torch.equal(weight, old) for weight, old in zip(ends, before, strict=True))
