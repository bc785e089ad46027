import inspect

import hf_selfkd


def test_all_is_sorted_complete_and_documented():
    assert hf_selfkd.__all__ == sorted(hf_selfkd.__all__)
    public = {
        name
        for name, value in vars(hf_selfkd).items()
        if getattr(value, "__module__", "").startswith("hf_selfkd.") and not name.startswith("_")
    }
    lazy = {"MultiExitAccuracy", "MultiExitAveragePrecision"}  # which are imported when they are asked for
    assert public | lazy == set(hf_selfkd.__all__)
    for name in hf_selfkd.__all__:
        assert inspect.getdoc(getattr(hf_selfkd, name)), name


def test_public_functions_are_typed():
    for name in hf_selfkd.__all__:
        value = getattr(hf_selfkd, name)
        if inspect.isfunction(value):
            signature = inspect.signature(value)
            assert signature.return_annotation is not inspect.Signature.empty, name
            for parameter in signature.parameters.values():
                known = parameter.annotation is not inspect.Parameter.empty
                assert known or parameter.kind is inspect.Parameter.VAR_KEYWORD, (name, parameter)
