import pytest
import torch
from torch import nn

from hf_selfkd import MultiExitForImageClassification
from hf_selfkd.deploy.segments import CannotCut, Segment, check_shrinks, cut_at_exits


def run(segments, images):
    """Run segments one after the other; return the logits of each."""
    logits, tensors = [], (images,)
    for segment in segments:
        found, *tensors = segment.module(*tensors)
        logits.append(found)
    assert not tensors
    return logits


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_segments_compute_what_the_model_does_also_on_fewer_images(build, name):
    model = build(name).eval()
    segments = cut_at_exits(model, (32, 32))
    check_shrinks(segments)
    images = torch.randn(5, 3, 32, 32)
    expected = model(images).exit_logits
    torch.testing.assert_close(run(segments, images), [*expected])
    _, crossing = segments[0].module(images)
    torch.testing.assert_close(run(segments[1:], crossing[[3]]), [logits[[3]] for logits in expected[1:]])


def test_every_weight_is_in_one_segment(build):
    model = build().eval()
    segments = cut_at_exits(model, (32, 32))
    counts = [sum(tensor.numel() for tensor in segment.module.parameters()) for segment in segments]
    assert min(counts) > 0
    assert sum(counts) == sum(tensor.numel() for tensor in model.parameters())


@torch.no_grad()
def test_what_depends_on_the_size_of_the_batch_alone_is_computed_anew():
    """The class token is expanded to the batch before the first cut, and the position embedding has no batch."""
    torch.manual_seed(0)
    model = MultiExitForImageClassification.from_backbone("test_vit", num_labels=5, exits=[0, 1]).eval()
    segments = cut_at_exits(model, (160, 160))
    assert [segment.rows for segment in segments] == [(1,), (1,), (1,)]
    assert [segment.examples[0].shape[0] for segment in segments] == [2, 2, 2]


def test_a_tensor_without_a_row_per_image_is_refused():
    segments = [
        Segment(nn.Identity(), (torch.zeros(2, 3, 8, 8),), (1,)),
        Segment(nn.Identity(), (torch.zeros(2, 4), torch.zeros(8, 4)), (1, 4)),
    ]
    with pytest.raises(CannotCut, match="Behind exit 0 the network reads a tensor of shape .8, 4. for two images"):
        check_shrinks(segments)


def test_an_image_that_affects_another_is_refused():
    class Mixing(nn.Module):
        def forward(self, tensor):
            return (tensor - tensor.mean(dim=0),)

    torch.manual_seed(0)
    examples = (torch.randn(2, 4),)
    segments = [Segment(nn.Identity(), (torch.zeros(2, 3, 8, 8),), (1,)), Segment(Mixing(), examples, (1,))]
    with pytest.raises(CannotCut, match="Behind exit 0 the network gives an image another result"):
        check_shrinks(segments)


@pytest.mark.parametrize("name", ["twins_svt_small", "crossvit_9_240"])
@pytest.mark.slow
def test_networks_that_do_not_shrink_in_python_do_in_segments(name):
    model = MultiExitForImageClassification.from_backbone(name, num_labels=5).eval()
    check_shrinks(cut_at_exits(model, model.config.pretrained_cfg["input_size"][1:]))
