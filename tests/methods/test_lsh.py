import copy

import pytest
import timm
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.functional import one_hot

from hf_selfkd import MultiExitForImageClassification, MultiExitOutput, get_method
from hf_selfkd.functional import hash_loss, hash_projection, is_correct, masked_mean, median_bias, mse, squared_error
from hf_selfkd.methods.lsh import LSH
from tests.helpers.processes import run_in_processes
from tests.helpers.runs import same_weights
from tests.helpers.versions import checkpoint_activations

SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "img_size": 32}
SWIN |= {"patch_size": 2, "window_size": 4}
BACKBONES = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "swin_tiny_patch4_window7_224"]


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    return timm.create_model("test_resnet", num_classes=5)


def student(build, backbone="test_resnet", **config):
    if backbone.startswith("swin"):
        config["backbone_kwargs"] = SWIN
    return build(backbone, **config)


def output_of(inputs, teacher_logits=None):
    """Return the output of a model with one exit and a scaffold with the planes of the vector."""
    weight, bias = inputs["hash_weight_NxD"], inputs["hash_bias"]
    features = inputs["student_features"]
    return MultiExitOutput(
        logits=inputs["student_logits"],
        exit_logits=(inputs["student_logits"],),
        exit_features=(features,),
        scaffold={
            "teacher_logits": inputs["teacher_logits"],
            "teacher_features": inputs["teacher_features"],
            "teacher_projection": hash_projection(inputs["teacher_features"], weight, bias),
            "student_projections": (hash_projection(features, weight, bias),),
        },
    )


# The authors' numbers


def test_bits_and_projections(vector):
    inputs, expected = vector("lsh.hash_bits")
    weight, bias = inputs["hash_weight_NxD"], inputs["hash_bias"]
    projection = hash_projection(inputs["teacher_features"], weight, bias)
    torch.testing.assert_close(projection, expected["teacher_projection"], atol=1e-5, rtol=0)
    assert torch.equal((projection > 0).float(), expected["bits"])
    projection = hash_projection(inputs["student_features"], weight, bias)
    torch.testing.assert_close(projection, expected["student_projection"], atol=1e-5, rtol=0)


def test_bits_do_not_depend_on_the_length_without_bias(vector):
    inputs, expected = vector("lsh.bits_scale_invariance_without_bias")
    for scale, bits in ((1.0, "bits_unscaled"), (inputs["scale"], "bits_scaled")):
        projection = hash_projection(scale * inputs["teacher_features"], inputs["hash_weight_NxD"], torch.zeros(3))
        assert torch.equal((projection > 0).long(), expected[bits])


@pytest.mark.parametrize(("name", "terms"), [("lsh.bce", ["hash"]), ("lsh.l2", ["feature"]), ("lsh.lshl2", None)])
def test_mimicking_terms(vector, name, terms):
    inputs, expected = vector(name)
    method = get_method("lsh", teacher="a teacher", mimic_weight=1.0, correct_only=False)
    found = method(output_of(inputs), inputs["labels"], 0.0)
    assert list(found) == ["label", "feature", "hash"]
    assert sum(found[term] for term in terms or ["feature", "hash"]).item() == pytest.approx(expected.item(), abs=1e-5)


def test_only_where_the_teacher_is_correct(vector):
    inputs, expected = vector("lsh.teacher_correct_only")
    terms = get_method("lsh", teacher="a teacher", mimic_weight=1.0)(output_of(inputs), inputs["labels"], 0.0)
    assert terms["hash"].item() == pytest.approx(expected["lsh"].item(), abs=1e-5)
    assert (terms["hash"] + terms["feature"]).item() == pytest.approx(expected["lshl2"].item(), abs=1e-5)
    one_hots = one_hot(inputs["labels"], 3).float()
    mixed = get_method("lsh", teacher="a teacher", mimic_weight=1.0)(output_of(inputs), 0.8 * one_hots + 0.0667, 0.0)
    assert torch.equal(mixed["hash"], terms["hash"])


def test_a_teacher_that_is_always_wrong_gives_nothing(vector):
    inputs, expected = vector("lsh.teacher_all_wrong")
    inputs["student_features"].requires_grad_()
    terms = get_method("lsh", teacher="a teacher")(output_of(inputs), inputs["labels"], 0.0)
    assert terms["feature"].item() == terms["hash"].item() == expected.item() == 0
    (terms["feature"] + terms["hash"]).backward()
    assert torch.equal(inputs["student_features"].grad, torch.zeros(3, 4))


def test_total_on_cifar(vector):
    inputs, expected = vector("lsh.total_cifar")
    terms = get_method("lsh", teacher="a teacher")(output_of(inputs), inputs["labels"], 0.0)
    assert sum(terms.values()).item() == pytest.approx(expected.item(), abs=1e-5)


def test_gradient_reaches_the_student_only(vector):
    inputs, expected = vector("lsh.grad_student_features")
    for name in ("student_features", "teacher_features", "hash_weight_NxD"):
        inputs[name].requires_grad_()
    method = get_method("lsh", teacher="a teacher", mimic_weight=1.0, correct_only=False)
    terms = method(output_of(inputs), inputs["labels"], 0.0)
    (terms["feature"] + terms["hash"]).backward()
    torch.testing.assert_close(inputs["student_features"].grad, expected, atol=1e-5, rtol=0)
    assert inputs["teacher_features"].grad is None


def test_bias_is_minus_the_lower_median(vector):
    inputs, expected = vector("lsh.bias_median_even")
    bias = median_bias(inputs["teacher_features"], inputs["hash_weight_NxD"])
    torch.testing.assert_close(bias, expected["bias"], atol=1e-6, rtol=0)
    inputs, expected = vector("lsh.bias_median_odd")
    bias = median_bias(inputs["teacher_features"], inputs["hash_weight_NxD"])
    torch.testing.assert_close(bias, expected, atol=1e-6, rtol=0)


# Arithmetic


@pytest.mark.parametrize("samples", [1, 10, 11])
def test_median_in_chunks_halves_the_samples(samples):
    features, weight = torch.randn(samples, 6), torch.randn(50, 6)
    bias = median_bias(features, weight)
    for max_elements in (1, 7 * samples):
        torch.testing.assert_close(median_bias(features, weight, max_elements=max_elements), bias)
    plain = [-sorted(column)[(samples - 1) // 2] for column in (features @ weight.T).T.tolist()]
    torch.testing.assert_close(bias, torch.tensor(plain))
    above = ((features @ weight.T + bias) > 1e-5).sum(dim=0)
    assert (above == samples // 2).all()


def test_float32_under_autocast():
    features, weight, bias = torch.randn(4, 8), torch.randn(16, 8), torch.randn(16)
    expected = hash_projection(features, weight, bias), median_bias(features, weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = hash_projection(features, weight, bias), median_bias(features, weight)
        loss = hash_loss(found[0], found[0])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and loss.dtype == torch.float32


def test_correct_predictions():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert is_correct(logits, torch.tensor([0, 0, -100, 0])).tolist() == [True, False, False, True]
    tie, nothing = [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]
    assert is_correct(logits, torch.tensor([tie, tie, nothing, [0.4, 0.6, 0.0]])).tolist() == [
        True,
        True,
        False,
        False,
    ]


def test_errors_per_sample_and_masked_mean():
    features, target = torch.randn(5, 3), torch.randn(5, 3)
    errors = squared_error(features, target)
    torch.testing.assert_close(masked_mean(errors, None), mse(features, target))
    mask = torch.tensor([True, False, True, False, False])
    torch.testing.assert_close(masked_mean(errors, mask), mse(features[mask], target[mask]))


# The self form


def test_without_a_teacher_early_exits_mimic_the_final_exit(exits_of_vectors):
    output, labels = exits_of_vectors
    weight = torch.randn(6, 4)
    for tensor in (*output.exit_features, *output.exit_logits):
        tensor.requires_grad_()
    *students, target = [hash_projection(features, weight, torch.zeros(6)) for features in output.exit_features]
    output.scaffold = {"student_projections": tuple(students), "teacher_projection": target}
    terms = get_method("lsh", mimic_weight=2.0)(output, labels, 0.0)
    *early, final = output.exit_features
    bits = (target > 0).float()
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(terms["feature"], 2 * sum((features - final).pow(2).mean() for features in early))
    torch.testing.assert_close(terms["hash"], 2 * sum(bce(projection, bits) for projection in students))
    cross_entropy = torch.nn.functional.cross_entropy
    torch.testing.assert_close(terms["label"], sum(cross_entropy(logits, labels) for logits in output.exit_logits))
    (terms["feature"] + terms["hash"]).backward()
    assert final.grad is None and all(features.grad.abs().sum() > 0 for features in early)


def test_form_follows_the_teacher(build):
    alone, taught = get_method("lsh"), get_method("lsh", teacher="resnet18")
    assert (alone.detach_exits, alone.min_exits) == (False, 2)
    assert (taught.detach_exits, taught.min_exits) == (True, 1)
    taught.check(build(exits=[]))
    with pytest.raises(ValueError, match="LSH needs at least 2 exits, but the model has 1"):
        alone.check(build(exits=[]))


# The hash layer


def test_planes(build, teacher):
    model = build()
    torch.manual_seed(5)
    layer = get_method("lsh", teacher=teacher).scaffold(model)
    torch.manual_seed(6)
    again = get_method("lsh", teacher=teacher).scaffold(model)
    assert torch.equal(layer.weight, again.weight)  # whatever the random state of a process
    assert layer.weight.shape == (32 * 96, 96) and not layer.bias.any()
    assert layer.weight.std().item() == pytest.approx(teacher.get_classifier().weight.std().item(), rel=0.01)
    assert layer.weight.mean().item() == pytest.approx(0, abs=0.01 * layer.weight.std().item())
    assert [*layer.state_dict()] == ["weight", "bias"] == [name for name, _ in layer.named_buffers(recurse=False)]
    assert not any(tensor.requires_grad for tensor in (layer.weight, layer.bias, *layer.parameters()))
    own = get_method("lsh", num_hashes=64).scaffold(model)
    assert own.weight.shape == (64, 96) and own.teacher is None
    torch.testing.assert_close(
        own.weight / model.backbone.get_classifier().weight.std(),
        get_method("lsh", num_hashes=64, hash_std=1.0).scaffold(model).weight,
    )


def test_a_student_of_another_width_gets_a_projection_that_ships(build, teacher, batch, tmp_path):
    method = get_method("lsh", teacher=teacher, bias="zero")
    with pytest.raises(ValueError, match="which have width 96, but the model's have width 64. Build .* exit_width=96"):
        method.scaffold(build("test_vit"))
    model = build("test_vit", exit_width=96).train()
    model.scaffold = method.scaffold(model)
    output = model(batch["pixel_values"])
    terms = method(output, batch["labels"], 0.0)
    assert terms["feature"].requires_grad
    model.save_pretrained(tmp_path)
    loaded = MultiExitForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(batch["pixel_values"]).logits, model.eval()(batch["pixel_values"]).logits)
    names = load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith("scaffold") for name in names)


def test_medians_are_those_of_the_training_set(build, teacher, images, train):
    trainer = train(build(), get_method("lsh", teacher=teacher, num_hashes=40), weight_decay=0.1)
    layer = trainer.scaffold
    features = teacher.eval().forward_head(
        teacher.forward_features(torch.stack([image["pixel_values"] for image in images])), pre_logits=True
    )
    torch.testing.assert_close(layer.bias, median_bias(features, layer.weight), atol=1e-5, rtol=1e-5)
    above = (hash_projection(features, layer.weight, layer.bias) > 1e-5).sum(dim=0)
    assert (above == 10).all()
    fresh = get_method("lsh", teacher=teacher, num_hashes=40).scaffold(build())
    assert torch.equal(layer.weight, fresh.weight)  # no optimiser, no weight decay
    model = build()
    model.scaffold = fresh
    for method in (get_method("lsh", teacher=teacher, bias="zero"), get_method("lsh")):
        method.prepare(model, [{"pixel_values": torch.zeros(2, 3, 32, 32)}])
        assert not fresh.bias.any()
    with pytest.raises(ValueError, match="LSH got no training batches to compute medians from"):
        get_method("lsh", teacher=teacher).prepare(model, [])


def prepare_on_one_process(rank, folder):
    """Prepare with every third batch (rank 1) or the others (rank 0), and store the medians."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = MultiExitForImageClassification.from_backbone("test_resnet", num_labels=5, small_input_stem=True)
    network = timm.create_model("test_resnet", num_classes=5)
    batches = [{"pixel_values": images} for images in torch.load(f"{folder}/images.pt")]
    torch.manual_seed(rank)
    method = get_method("lsh", teacher=network, num_hashes=40)
    model.scaffold = method.scaffold(model)
    method.prepare(model, [batch for index, batch in enumerate(batches) if (index % 3 == 2) == (rank == 1)])
    together = model.scaffold.state_dict()
    dist.destroy_process_group()
    method.prepare(model, batches)
    torch.save((together, model.scaffold.state_dict()), f"{folder}/rank{rank}.pt")


@pytest.mark.slow
def test_medians_are_of_all_processes(tmp_path):
    torch.save(list(torch.randn(9, 3, 32, 32).split(2)), tmp_path / "images.pt")
    run_in_processes(prepare_on_one_process, 2, str(tmp_path))
    (first, alone), (second, _) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in ("weight", "bias"))
    assert torch.equal(first["bias"], alone["bias"]) and first["bias"].count_nonzero() == 40


# Training


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("taught", [False, True])
def test_every_parameter_learns(build, batch, teacher, backbone, taught):
    # The stock stem, because convolutions of large feature maps in bfloat16 are slow on a CPU.
    model = student(build, backbone, exit_width=96 if taught else None, small_input_stem=False).train()
    method = get_method("lsh", teacher=teacher if taught else None, correct_only=False, num_hashes=64)
    model.scaffold, model.detach_exits = method.scaffold(model), method.detach_exits
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch["pixel_values"])
        terms = method(output, batch["labels"], 0.0)
    assert len(output.scaffold["student_projections"]) == (1 if taught else model.num_exits - 1)
    assert all(term.isfinite() and term > 0 and term.dtype == torch.float32 for term in terms.values())
    exits = [logits.sum() for logits in output.exit_logits[:-1]] if taught else []
    (sum(terms.values()) + sum(exits)).backward()
    learning = {name: p for name, p in model.named_parameters() if not name.startswith("scaffold.")}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learning.values())
    assert all(p.grad is None for p in model.scaffold.parameters())


def test_one_image_is_a_batch(build, batch, teacher):
    for method in (get_method("lsh"), get_method("lsh", teacher=teacher)):
        model = build().train()
        model.scaffold = method.scaffold(model)
        terms = method(model(batch["pixel_values"][:1]), batch["labels"][:1], 0.0)
        assert all(term.isfinite() for term in terms.values())


def test_gradient_checkpointing_changes_nothing(build, batch, teacher):
    gradients = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            checkpoint_activations(model)
        method = get_method("lsh", teacher=teacher, correct_only=False)
        model.scaffold = method.scaffold(model)
        sum(method(model(batch["pixel_values"]), batch["labels"], 0.0).values()).backward()
        gradients.append(model.backbone.conv1[0].weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "taught"), [("test_vit", False), ("test_resnet", True)])
def test_compiles_as_one_graph(build, batch, teacher, backbone, taught):
    model = build(backbone).train()
    method = get_method("lsh", teacher=teacher if taught else None, num_hashes=32)
    model.scaffold = method.scaffold(model)
    reference = copy.deepcopy(model)(batch["pixel_values"])
    output = torch.compile(model, backend="eager", fullgraph=True)(batch["pixel_values"])
    for name, term in method(output, batch["labels"], 0.0).items():
        torch.testing.assert_close(term, method(reference, batch["labels"], 0.0)[name])


@pytest.mark.parametrize("taught", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.slow
def test_resumes_with_its_hash_layer_and_never_prepares_again(build, train, teacher, tmp_path, monkeypatch, taught):
    settings = {"num_train_epochs": 2, "save_strategy": "epoch", "label_smoothing_factor": 0.1, "bf16": True}
    method = get_method("lsh", teacher=teacher if taught else None, num_hashes=40)
    # The stock stem, because convolutions of large feature maps in bfloat16 are slow on a CPU.
    trainer = train(build(small_input_stem=False), method, **settings)
    entry = trainer.state.log_history[0]
    names = ["label", "feature", "hash"] + (["exits"] if taught else [])
    assert entry["loss"] == pytest.approx(sum(entry[f"loss/{name}"] for name in names), abs=1e-3)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    saved = load_file(checkpoint / "scaffold.safetensors")
    assert saved.keys() == {"weight", "bias"} and bool(saved["bias"].any()) == taught
    assert not any("scaffold" in name or "network" in name for name in load_file(checkpoint / "model.safetensors"))
    monkeypatch.setattr(LSH, "prepare", lambda *args: pytest.fail("prepared on resume"))
    resumed = train(build(small_input_stem=False), method, resume=str(checkpoint), **settings)
    assert torch.equal(resumed.scaffold.bias, saved["bias"])
    assert same_weights(resumed.model, trainer.model)


def test_exits_leave_a_taught_backbone_alone(build, train, teacher):
    method = get_method("lsh", teacher=teacher, num_hashes=40)
    with_exits, without = train(build(), method), train(build(exits=[]), method)
    found, expected = (dict(trainer.model.backbone.state_dict()) for trainer in (with_exits, without))
    torch.testing.assert_close(found, expected)


# Settings


def test_defaults_are_the_papers_for_cifar():
    assert get_method("lsh").to_dict() == {
        "name": "lsh",
        "teacher": None,
        "teacher_decay": None,
        "mimic_weight": 6.0,
        "num_hashes": None,
        "hash_std": None,
        "bias": None,
        "correct_only": True,
    }


def test_to_dict_keeps_the_teacher_itself(teacher):
    method = get_method("lsh", teacher=teacher, bias="median")
    assert method.to_dict()["teacher"] is teacher
    assert get_method(**method.to_dict()) == method != get_method("lsh")


def test_errors(build, exits_of_vectors):
    with pytest.raises(ValueError, match="LSH needs mimic_weight >= 0, but got mimic_weight=-1"):
        get_method("lsh", mimic_weight=-1)
    with pytest.raises(ValueError, match="LSH needs a positive integer as num_hashes, but got num_hashes=0.5"):
        get_method("lsh", num_hashes=0.5)
    with pytest.raises(ValueError, match="LSH needs hash_std > 0, but got hash_std=0"):
        get_method("lsh", hash_std=0)
    with pytest.raises(ValueError, match="LSH needs bias 'median' or 'zero', but got bias='mean'"):
        get_method("lsh", bias="mean")
    with pytest.raises(ValueError, match="LSH needs a teacher for bias='median'.* frozen teacher, or bias='zero'"):
        get_method("lsh", bias="median")
    with pytest.raises(ValueError, match="LSH was called without its hash layer. Train with SelfDistillationTrainer"):
        get_method("lsh")(*exits_of_vectors, 0.0)
    model = build()
    torch.nn.init.zeros_(model.backbone.get_classifier().weight)
    with pytest.raises(ValueError, match="standard deviation of the classifier's weights, but these are all equal"):
        get_method("lsh").scaffold(model)
    assert get_method("lsh", hash_std=0.03).scaffold(model).weight.std().item() == pytest.approx(0.03, rel=0.01)
