import torch

from hf_selfkd import get_method
from hf_selfkd.functional import cross_entropy
from tests.helpers.runs import same_weights


def test_it_is_the_label_loss_of_the_final_exit(exits_of_vectors, vector):
    output, labels = exits_of_vectors
    _, expected = vector("common.ce_per_exit")
    terms = get_method("none")(output, labels, 0.0)
    assert list(terms) == ["label"]
    torch.testing.assert_close(terms["label"], expected[-1], atol=1e-5, rtol=0)


def test_the_backbone_learns_exactly_as_without_exits(build, batch, train, images):
    plain = train(build(exits=[]), "none").model
    with_exits = train(build(), "none").model
    assert same_weights(with_exits, plain)
    fresh = build().exits.state_dict()
    learnt = with_exits.exits.state_dict()
    assert not any(torch.equal(fresh[name], learnt[name]) for name in fresh if name.endswith("weight"))


def test_a_model_without_exits_is_a_plain_model(build, batch):
    model = build(exits=[])
    output = model(**batch)
    assert model.num_exits == len(output.exit_logits) == 1
    assert torch.equal(output.loss, cross_entropy(output.logits, batch["labels"]))
