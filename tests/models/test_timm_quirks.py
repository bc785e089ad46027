import copy

import pytest
import timm
import torch

from hf_selfkd import MultiExitForImageClassification
from hf_selfkd.models.timm_quirks import copy_module


@pytest.fixture
def computed():
    """Return a network that keeps attention biases which hang on a graph, and its images."""
    torch.manual_seed(0)
    model = MultiExitForImageClassification.from_backbone("levit_128s", num_labels=5).eval()
    images = torch.randn(1, 3, 224, 224)
    model(images)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model.backbone)
    return model, images


def test_a_copy_answers_alike_and_shares_nothing(computed):
    model, images = computed
    copied = copy_module(model.backbone)
    with torch.no_grad():
        assert torch.equal(copied(images), model.backbone(images))
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in copied.parameters()}


def test_what_copies_a_network_works_on_it(computed, tmp_path):
    model, images = computed
    model.save_timm(tmp_path)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(images), model.backbone(images))
    assert model.copy_tail(1) is not None
