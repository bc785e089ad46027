from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from hf_selfkd import Method, get_method, list_methods


@pytest.fixture
def own_method(own_methods):
    """A method that a user defines in a notebook."""

    @dataclass(frozen=True, kw_only=True)
    class Own(Method):
        name: ClassVar[str] = "own"
        paper: ClassVar[str] = "https://arxiv.org/abs/1503.02531"
        weight: float = 1.0

        def __call__(self, output, labels, epoch):
            return {"label": self.weight * output.exit_logits[-1].sum()}

    return Own


def test_defining_a_method_registers_it(own_method):
    assert "own" in list_methods()
    assert list_methods() == sorted(list_methods())
    method = get_method("own", weight=2.0)
    assert isinstance(method, own_method)
    assert method.to_dict() == {"name": "own", "weight": 2.0}
    assert get_method(**method.to_dict()) == method


def test_a_name_belongs_to_one_method(own_method):
    with pytest.raises(ValueError, match="Method name 'own' is taken by .*test_base.*Own"):

        class Other(Method):
            name = "own"


def test_a_method_may_be_defined_again(own_method):
    class Again(Method):
        name = "own"
        __qualname__ = own_method.__qualname__

    assert type(get_method("own")) is Again


def test_unknown_method():
    with pytest.raises(ValueError) as error:
        get_method("byto")
    assert str(error.value).startswith("Unknown method 'byto'. Did you mean 'byot'? Available: byot, ")


def test_unknown_hyper_parameter():
    with pytest.raises(ValueError) as error:
        get_method("byot", alhpa=0.5)
    assert str(error.value) == (
        "BYOT has no hyper-parameter 'alhpa'. Did you mean 'alpha'? Available: alpha, temperature, hint_weight, "
        "teacher, teacher_decay."
    )
    with pytest.raises(ValueError, match="Available: none."):
        get_method("none", alpha=0.5)


@pytest.mark.parametrize("name", ["byot", "deep_supervision", "eed"])
def test_fewer_exits_than_a_method_needs(build, name):
    with pytest.raises(ValueError, match=f"{type(get_method(name)).__name__} needs at least 2 exits, but .* has 1"):
        get_method(name).check(build(exits=[]))


def test_a_method_without_a_loss_says_so():
    class Empty(Method, registered=False):
        name = "empty"

    with pytest.raises(TypeError, match="Empty must define __call__"):
        Empty()(None, torch.zeros(1), 0.0)


@pytest.mark.parametrize("name", ["build", "build_segmenter"])
def test_one_class_cannot_be_learned(request, name):
    model = request.getfixturevalue(name)(num_labels=1)
    for method in (get_method("none"), get_method("none+deep_supervision")):
        with pytest.raises(ValueError, match="num_labels=1 has nothing to learn: .* num_labels=2 for two classes"):
            method.attach(model)
