import torch

from hf_selfkd import get_method


def test_it_is_the_label_loss_of_every_exit(exits_of_vectors, vector):
    _, expected = vector("common.ce_per_exit")
    terms = get_method("deep_supervision")(*exits_of_vectors, 0.0)
    assert list(terms) == ["label"]
    torch.testing.assert_close(terms["label"], expected.sum(), atol=1e-5, rtol=0)
