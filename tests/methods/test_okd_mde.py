import io
import logging
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from hf_selfkd import MultiExitForImageClassification, MultiExitOutput, get_method
from hf_selfkd.functional import (
    add,
    cosine_overlap,
    cross_entropy,
    disagreement,
    gated_sum,
    gram_overlap,
    sigmoid_ramp,
    soften_kl,
)
from hf_selfkd.methods.students import FeatureFusion


def close(value, expected):
    torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(expected), atol=1e-5, rtol=0)


def with_students(student_logits, ensemble_logits, overlap=0.0):
    """Return the output of a model whose scaffold computed this."""
    scaffold = {
        "branch_logits": tuple(student_logits[1:]),
        "ensemble_logits": ensemble_logits,
        "overlap": torch.as_tensor(overlap),
    }
    return MultiExitOutput(logits=student_logits[0], exit_logits=(student_logits[0],), scaffold=scaffold)


def family_divergence(student, teacher, temperature=3.0):
    """OKDDip's divergence: 1e-7 is added to the target's probabilities, which ours does without."""
    target = (teacher / temperature).softmax(dim=1) + 1e-7
    return temperature**2 * F.kl_div((student / temperature).log_softmax(dim=1), target, reduction="batchmean")


@pytest.fixture
def trained(build):
    """Return a model with its students, in training mode."""

    def trained(backbone="test_resnet", method="okd_mde", **config):
        model = build(backbone, **config)
        method = get_method(method)
        model.detach_exits = method.detach_exits
        model.scaffold = method.scaffold(model)
        return method, model.train()

    return trained


# Vectors


def test_divergence_to_the_ensemble(vector):
    inputs, expected = vector("okd.kl_T3")
    close(soften_kl(inputs["student"], inputs["target"], 3.0), expected["exact"])
    close(family_divergence(inputs["student"], inputs["target"]), expected["with_1e_7_added_to_target_probs"])


def test_ramp(vector):
    inputs, expected = vector("okd.ramp")
    close([sigmoid_ramp(epoch / 80) for epoch in inputs["epochs"].tolist()], expected)


def test_the_distillation_grows_once_an_epoch(vector):
    inputs, expected = vector("okd.ramp")
    logits = torch.randn(3, 4, 5)
    output = with_students(logits.unbind(), logits.mean(dim=0))
    terms = [
        get_method("okd_mde")(output, torch.arange(4), epoch + 0.9)["logit"] for epoch in inputs["epochs"].tolist()
    ]
    close(torch.stack(terms) / terms[-1], expected)


def test_okddip_attention(vector):
    inputs, expected = vector("okd.okddip_attention")
    features = inputs["peer_features_BxMxD"]
    queries, keys = features @ inputs["Wq"].T, features @ inputs["Wk"].T
    attention = (queries @ keys.transpose(1, 2)).softmax(dim=-1)
    close(attention, expected["attention"])
    targets = [gated_sum(inputs["peer_logits"].unbind(), gates) for gates in attention.unbind(dim=1)]
    close(torch.stack(targets), expected["targets"])


def test_okddip_total(vector):
    inputs, expected = vector("okd.okddip_total")
    labels, peers, leader = inputs["labels"], inputs["peer_logits"].unbind(), inputs["leader_logits"]
    features = vector("okd.okddip_attention")[0]
    attention = torch.stack(vector("okd.okddip_attention")[1]["attention"].unbind(dim=1))
    assert torch.equal(features["peer_logits"], inputs["peer_logits"])
    targets = [gated_sum(peers, gates) for gates in attention]
    total = add(cross_entropy(logits, labels) for logits in [*peers, leader])
    total += 0.5 * add(soften_kl(logits, target, 3.0) for logits, target in zip(peers, targets, strict=True))
    total += 0.5 * soften_kl(leader, torch.stack(peers).mean(dim=0), 3.0)
    close(total, expected)


def test_one_total_is_this_method_without_diversification(vector):
    inputs, expected = vector("okd.one_total")
    students, labels = inputs["branch_logits"].unbind(), inputs["labels"]
    ensemble = gated_sum(students, inputs["gates"])
    close(ensemble, expected["ensemble_logits"])
    # Half the distillation: the epoch at which the ramp is 0.5.
    terms = get_method("okd_mde")(with_students(students, ensemble), labels, epoch=1000)
    close(add(terms.values()) - 0.5 * terms["logit"], expected["total"])


def test_one_gate(vector):
    inputs, expected = vector("okd.one_gate_activation")
    close(inputs["pre"].relu().softmax(dim=-1), expected)


def test_dml_total(vector):
    inputs, expected = vector("okd.dml_total")
    branches, labels = inputs["branch_logits"].unbind(), inputs["labels"]
    distances = add(family_divergence(student, teacher) for student, teacher in permutations(branches, 2))
    total = add(cross_entropy(logits, labels) for logits in branches) + distances / (len(branches) - 1)
    close(total, expected)


def test_gram_overlap(vector):
    inputs, expected = vector("okdmde.cd_gram")
    weights = [weight.clone().requires_grad_() for weight in inputs["classifier_weights_KxC"]]
    pairs = [gram_overlap([weights[a], weights[b]]) for a, b in [(0, 1), (0, 2), (1, 2)]]
    close(torch.stack(pairs).detach(), expected["pairs_12_13_23"])
    total = gram_overlap(weights)
    total.backward()
    close(total.detach(), expected["total"])
    close(weights[0].grad, expected["grad_W1"])
    close(gram_overlap(weights[::-1]).detach(), expected["total"])


def test_cosine_overlap(vector):
    inputs, expected = vector("okdmde.cd_row_cosine")
    weights = inputs["classifier_weights_KxC"].unbind()
    pairs = [cosine_overlap([weights[a], weights[b]]) for a, b in [(0, 1), (0, 2), (1, 2)]]
    close(torch.stack(pairs), expected["pairs_12_13_23"])
    close(cosine_overlap(weights), expected["mean_over_pairs"])
    close(cosine_overlap([0.1 * weight for weight in weights]), expected["mean_over_pairs"])


def test_ensemble(vector):
    inputs, expected = vector("okdmde.ensemble")
    close(gated_sum(inputs["student_logits"].unbind(), inputs["fused_gate_weights"]), expected)


@pytest.mark.parametrize("name", ["okdmde.total.ramp1_cd5e-08", "okdmde.total.ramp0.5_cd0.01"])
def test_total(vector, name):
    inputs, expected = vector(name)
    students = inputs["student_logits"].unbind()
    output = with_students(
        students,
        gated_sum(students, inputs["fused_gate_weights"]),
        gram_overlap(inputs["classifier_weights_KxC"].unbind()),
    )
    method = get_method("okd_mde", overlap_weight=inputs["lam_cd"].item(), temperature=inputs["temperature"].item())
    terms = method(output, inputs["labels"], epoch=80)
    terms["logit"] = terms["logit"] * inputs["ramp"]
    close(add(terms.values()), expected)


def test_fusion_gate(vector):
    inputs, expected = vector("okdmde.ffm_gate")
    fusion = FeatureFusion(width=2, num_students=2)
    fusion.norm = torch.nn.Identity()  # the vector omits it
    for module, number in [(fusion.squeeze, 1), (fusion.gate, 2)]:
        module.weight.data, module.bias.data = inputs[f"W{number}"], inputs[f"b{number}"]
    features = inputs["pooled_features_BxMxC"]
    close(fusion.squeeze(features.flatten(1)).relu().detach(), expected["hidden"])
    close(fusion(features.unbind(dim=1)).detach(), expected["weights"])


def test_disagreement(vector):
    inputs, expected = vector("okd.diversity_metric")
    students = inputs["student_logits"].unbind()
    close(disagreement(students), expected["mean"])
    per_sample = [disagreement([logits[[sample]] for logits in students]) for sample in range(2)]
    close(torch.stack(per_sample), expected["per_sample"])
    metrics = get_method("okd_mde").metrics(with_students(students, students[0]))
    close(metrics["disagreement"], expected["mean"])


# Easy mistakes


def test_students_differ_from_the_start(trained, batch):
    method, model = trained()
    output = model(batch["pixel_values"])
    logits = (output.logits, *output.scaffold["branch_logits"])
    assert len(logits) == 3
    for a, b in permutations(logits, 2):
        assert (a - b).abs().max() > 1e-2


def test_gates_add_up_to_one_and_depend_on_every_student():
    fusion = FeatureFusion(width=8, num_students=3)
    features = [torch.randn(4, 8, requires_grad=True) for _ in range(3)]
    gates = fusion(features)
    close(gates.sum(dim=1).detach(), torch.ones(4))
    gates[:, 0].sum().backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in features)


def test_equal_gates_give_the_mean():
    logits = torch.randn(3, 4, 5)
    close(gated_sum(logits.unbind(), torch.full((4, 3), 1 / 3)), logits.mean(dim=0))


def test_orthogonal_classifiers_do_not_overlap_and_have_a_finite_gradient():
    weights = [torch.eye(4)[:, columns].requires_grad_() for columns in ([0, 1], [2, 3])]
    for overlap in (gram_overlap, cosine_overlap):
        value = overlap(weights)
        value.backward()
        assert value == 0
        assert all(weight.grad.isfinite().all() for weight in weights)


@pytest.mark.parametrize("overlap", ["gram", "cosine"])
def test_the_overlap_term_pushes_classifiers_apart(trained, batch, overlap):
    method, model = trained()
    method = get_method("okd_mde", overlap=overlap, overlap_weight=1.0)
    model.scaffold = method.scaffold(model)
    before = method(model(batch["pixel_values"]), batch["labels"], 0.0)["overlap"]
    before.backward()
    changed = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert len(changed) == 3 and all(name.endswith("fc.weight") for name in changed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    after = method(model(batch["pixel_values"]), batch["labels"], 0.0)["overlap"]
    assert after < before


def test_default_weight_is_as_strong_as_weight_decay_at_the_start():
    torch.manual_seed(0)
    weights = [torch.nn.Linear(512, 100).weight for _ in range(3)]
    (get_method("okd_mde").overlap_weight * gram_overlap(weights)).backward()
    decay = 5e-4 * weights[0].detach().norm()
    assert 0.5 < weights[0].grad.norm() / decay < 2
    assert 5e-8 / get_method("okd_mde").overlap_weight * weights[0].grad.norm() / decay < 1e-4


def test_distillation_teaches_students_and_label_loss_teaches_fusion(trained, batch):
    method, model = trained()

    def reached(term):
        output = model(batch["pixel_values"])
        loss = method(output, batch["labels"], 80.0)[term]
        grads = torch.autograd.grad(loss, list(model.scaffold.parameters()), allow_unused=True)
        names = [name for name, _ in model.scaffold.named_parameters()]
        return {name.split(".")[0] for name, grad in zip(names, grads, strict=True) if grad is not None and grad.any()}

    assert reached("logit") == {"branches"}
    assert reached("ensemble") == {"branches", "fusion"}


def test_no_distillation_where_all_students_agree():
    logits = torch.randn(4, 5)
    output = with_students([logits] * 3, gated_sum([logits] * 3, torch.rand(4, 3).softmax(dim=1)))
    assert get_method("okd_mde")(output, torch.arange(4), 80.0)["logit"].abs() < 1e-6


def test_every_parameter_of_the_network_and_the_students_is_trained(trained, batch):
    method, model = trained(exits=[])
    add(method(model(batch["pixel_values"]), batch["labels"], 0.0).values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("backbone", ["test_resnet", pytest.param("test_vit", marks=pytest.mark.slow)])
def test_any_branch_is_a_plain_model(trained, train, images, batch, tmp_path, backbone):
    trainer = train(trained(backbone)[1], "okd_mde")
    model = trainer.model.eval()
    pixel_values = batch["pixel_values"]
    with torch.no_grad():
        output = model(pixel_values, output_hidden_states=True)
        logits_of_students = (output.logits, *model.scaffold(pixel_values, output)["branch_logits"])
        for student in range(3):
            branch = model.scaffold.to_model(model, student)
            assert torch.equal(branch(pixel_values).logits, logits_of_students[student])
            branch.save_pretrained(tmp_path / f"{student}")
            loaded = MultiExitForImageClassification.from_pretrained(tmp_path / f"{student}")
            torch.testing.assert_close(loaded(pixel_values).logits, logits_of_students[student], atol=1e-5, rtol=1e-5)
            assert sum(p.numel() for p in loaded.parameters()) == sum(
                p.numel() for name, p in model.named_parameters() if not name.startswith("scaffold")
            )
    assert model.scaffold is not None


@pytest.mark.slow
def test_the_ensemble_is_exported(trained, batch):
    method, model = trained()
    model(batch["pixel_values"])
    model.eval()
    output = model(batch["pixel_values"], output_hidden_states=True)
    expected = model.scaffold(batch["pixel_values"], output)["ensemble_logits"]
    ensemble = model.scaffold.to_ensemble(model)
    assert torch.equal(ensemble(batch["pixel_values"]), expected)
    assert ensemble.students.fusion is not model.scaffold.fusion and model.scaffold is not None
    file = io.BytesIO()
    torch.export.save(torch.export.export(ensemble, (batch["pixel_values"],)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    torch.testing.assert_close(loaded(batch["pixel_values"]), expected, atol=1e-5, rtol=1e-5)


def test_a_policy_does_not_move_to_another_branch(trained):
    method, model = trained()
    model.config.exit_policy = {"criterion": "confidence"}
    assert model.scaffold.to_model(model, 1).config.exit_policy is None
    assert model.config.exit_policy == {"criterion": "confidence"}


def test_exits_after_the_branching_point_rule_out_a_branch_by_itself(trained):
    method, model = trained("test_vit", exits=[1, 4])
    with pytest.raises(ValueError, match=r"Branches begin after stage 3, but the model has exits at \[1, 4\]. Build"):
        model.scaffold.to_model(model, 1)


def test_unknown_branch(trained):
    method, model = trained()
    with pytest.raises(ValueError, match="There are branches 0 to 2, but to_model was asked for 3"):
        model.scaffold.to_model(model, 3)


# Networks that are not sequential


@pytest.fixture
def not_sequential(monkeypatch):
    def refuse(self, stage=None):
        raise ValueError("The layers after stage 3 of this Net cannot be copied: the network is not sequential there.")

    monkeypatch.setattr(MultiExitForImageClassification, "copy_tail", refuse)


def test_exits_are_the_students_where_the_last_stage_cannot_be_copied(not_sequential, trained, batch, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_selfkd"):
        method, model = trained()
    assert "OKDMDE uses the 4 exits as students instead." in caplog.text
    output = model(batch["pixel_values"])
    assert "branch_logits" not in output.scaffold
    weights = [head.classifier.weight for head in model.exits] + [model.backbone.fc.weight]
    close(output.scaffold["overlap"].detach(), gram_overlap(weights).detach())
    terms = method.terms(output, batch["labels"], 0.0)
    torch.testing.assert_close(terms["students"], cross_entropy(output.exit_logits[:-1], batch["labels"]))
    assert "exits" not in terms
    add(terms.values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_exits_that_are_students_are_not_detached(not_sequential, build, train):
    trainer = train(build(), "okd_mde", max_steps=1)
    assert not trainer.model.detach_exits
    assert "loss/exits" not in trainer.state.log_history[0]


def test_without_exits_there_are_no_students_left(not_sequential, build):
    with pytest.raises(ValueError, match="OKDMDE could use exits as students, but the model has none"):
        get_method("okd_mde").scaffold(build(exits=[]))


# Training, errors


def test_training_logs_the_disagreement_with_the_terms(build, train):
    log = train(build(), "okd_mde", max_steps=1).state.log_history[0]
    terms = [value for name, value in log.items() if name.startswith("loss/")]
    assert sum(terms) == pytest.approx(log["loss"], abs=1e-4)
    assert {"loss/label", "loss/students", "loss/ensemble", "loss/logit", "loss/overlap", "loss/exits"} <= log.keys()
    assert 0 < log["disagreement"] < 2**0.5


def test_in_a_combination_every_student_still_learns_from_the_labels(build, train):
    log = train(build(), "eed+okd_mde", max_steps=1).state.log_history[0]
    assert log["loss/okd_mde/students"] > 1 and "loss/okd_mde/label" not in log
    assert log["okd_mde/disagreement"] > 0


def test_students_are_resumed(build, train, tmp_path):
    uninterrupted = train(
        build(), "okd_mde", num_train_epochs=2, save_strategy="epoch", output_dir=str(tmp_path / "uninterrupted")
    )
    checkpoint = str(tmp_path / "uninterrupted" / "checkpoint-4")
    resumed = train(build(), "okd_mde", num_train_epochs=2, resume=checkpoint, output_dir=str(tmp_path / "resumed"))
    ours, theirs = resumed.model.state_dict(), uninterrupted.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_called_without_students(exits_of_vectors):
    output, labels = exits_of_vectors
    with pytest.raises(ValueError, match="OKDMDE was called without its students. Train with SelfDistillationTrainer"):
        get_method("okd_mde")(output, labels, 0.0)


@pytest.mark.parametrize(
    ("hyper_parameter", "words"),
    [
        ({"num_students": 1}, "OKDMDE needs num_students >= 2, but got num_students=1"),
        ({"num_students": 2.5}, "OKDMDE needs an integer as num_students, but got num_students=2.5"),
        ({"temperature": 0}, "OKDMDE needs temperature > 0, but got temperature=0"),
        ({"ramp_epochs": 0}, "OKDMDE needs ramp_epochs > 0, but got ramp_epochs=0"),
        ({"overlap": "l2"}, "OKDMDE needs overlap 'gram' or 'cosine', but got overlap='l2'"),
        ({"overlap_weight": -1}, "OKDMDE needs overlap_weight >= 0, but got overlap_weight=-1"),
    ],
)
def test_hyper_parameters_out_of_range(hyper_parameter, words):
    with pytest.raises(ValueError, match=words):
        get_method("okd_mde", **hyper_parameter)
