import pytest

from hf_selfkd.methods import base


@pytest.fixture
def own_methods():
    """Remove the methods that a test defines from the registry, for which there is no public way."""
    before = dict(base._METHODS)
    yield
    base._METHODS.clear()
    base._METHODS.update(before)
