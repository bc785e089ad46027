"""A loss function of the user's own is the label loss of every exit."""

import pytest
import torch
import torch.nn.functional as F

from hf_selfkd import Method
from tests.helpers.runs import losses, same_weights

WEIGHTS = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])


def weighted(outputs, labels, num_items_in_batch=None):
    """Return the loss of the recipe for class weights that is published most."""
    return F.cross_entropy(outputs["logits"], labels, weight=WEIGHTS)


def summed(outputs, labels, num_items_in_batch):
    """Return the loss as transformers' own models compute it."""
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("method", ["frskd", "okd_mde", "eed+lsh"])
def test_it_is_the_loss_of_every_label_term_and_of_no_other(build, train, method):
    def doubled(outputs, labels, num_items_in_batch):
        return 2 * summed(outputs, labels, num_items_in_batch)

    own = train(build(), method, max_steps=1, trainer_kwargs={"compute_loss_func": doubled}).state.log_history[0]
    built_in = train(build(), method, max_steps=1).state.log_history[0]
    for name in (name for name in own if name.startswith("loss/")):
        is_label_loss = name.rpartition("/")[2] in ("label", "teacher", "students", "ensemble", "exits")
        assert own[name] == pytest.approx((2 if is_label_loss else 1) * built_in[name]), name


@pytest.mark.parametrize("method", ["byot", pytest.param("frskd", marks=pytest.mark.slow)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_sum_over_the_number_of_items_is_the_built_in_loss(build, train, images, method, accumulation):
    some = [image | {"labels": -100 if index % 3 == 0 else image["labels"]} for index, image in enumerate(images)]
    options = {"gradient_accumulation_steps": accumulation, "max_steps": 2}
    own = train(build(), method, trainer_kwargs={"train_dataset": some, "compute_loss_func": summed}, **options)
    built_in = train(build(), method, trainer_kwargs={"train_dataset": some}, **options)
    assert losses(own) == losses(built_in)
    assert same_weights(own.model, built_in.model)


def test_the_evaluation_has_its_loss_too(build, train, images):
    own_loss = {"compute_loss_func": weighted}
    trainer = train(build(), max_steps=1, per_device_eval_batch_size=20, trainer_kwargs=own_loss)
    metrics = trainer.evaluate()
    with torch.no_grad():
        output = trainer.model.eval()(torch.stack([image["pixel_values"] for image in images]))
    labels = torch.tensor([image["labels"] for image in images])
    assert metrics["eval_loss"] == pytest.approx(weighted({"logits": output.logits}, labels).item(), rel=1e-4)
    assert metrics["eval_exit_3_loss"] == pytest.approx(F.cross_entropy(output.logits, labels).item(), rel=1e-4)


def test_label_maps_meet_logits_of_their_size(build_segmenter, train):
    sizes = []

    def own(outputs, labels, num_items_in_batch):
        sizes.append((outputs.logits.shape, labels.shape, int(num_items_in_batch)))
        return F.cross_entropy(outputs.logits, labels)

    label = torch.zeros(32, 32, dtype=torch.uint8)
    label[:4] = 255
    maps = 2 * [{"pixel_values": torch.randn(3, 32, 32), "labels": label}]
    data = {"train_dataset": maps, "eval_dataset": maps, "compute_loss_func": own}
    train(build_segmenter(), "deep_supervision", max_steps=1, per_device_train_batch_size=2, trainer_kwargs=data)
    assert set(sizes) == {((2, 5, 32, 32), (2, 32, 32), 2 * 28 * 32)}


def test_a_method_that_computes_its_label_loss_itself_is_named(build, train):
    class OwnLoss(Method, registered=False):
        name = "own_loss"
        paper = "https://example.com"

        def __call__(self, output, labels, epoch):
            return {"label": F.cross_entropy(output.logits, labels)}

    with pytest.raises(ValueError, match="compute_loss_func has no effect on OwnLoss, which does not"):
        train(build(), OwnLoss(), trainer_kwargs={"compute_loss_func": weighted})
