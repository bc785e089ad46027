"""Methods and combinations of methods by their names."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from ..models.did_you_mean import did_you_mean
from .base import _METHODS, Method
from .combination import Combination


def list_methods() -> list[str]:
    """List the names of all methods, sorted."""
    return sorted(_METHODS)


def get_method(name: str, **hyper_parameters) -> Method:
    """Create a method by its name.

    Args:
        name: One of :func:`list_methods`, or several joined as in ``"eed+lsh"``.
        hyper_parameters: Fields of the method; the others keep the paper's values. For several methods, a
            dictionary for each: ``get_method("eed+lsh", lsh={"mimic_weight": 5.0})``.

    Raises:
        ValueError: If there is no such method or hyper-parameter, or a value is out of range.

    Example:
        >>> get_method("byot", alpha=0.5)
        BYOT(alpha=0.5, temperature=3.0, hint_weight=0.03, teacher=None, teacher_decay=None)
    """
    if "+" in name:
        return combine(name.split("+"), hyper_parameters)
    if name not in _METHODS:
        raise ValueError(
            f"Unknown method '{name}'.{did_you_mean(name, _METHODS)} Available: {', '.join(list_methods())}."
        )
    method = _METHODS[name]
    check_hyper_parameters(method.__name__, hyper_parameters, [field.name for field in fields(method)])
    return method(**hyper_parameters)


def check_hyper_parameters(owner: str, given: Iterable[str], known: list[str]) -> None:
    """Raise ValueError if a given name is not a hyper-parameter of ``owner``."""
    for name in given:
        if name not in known:
            raise ValueError(
                f"{owner} has no hyper-parameter '{name}'.{did_you_mean(name, known)} "
                f"Available: {', '.join(known) or 'none'}."
            )


def combine(names: list[str], hyper_parameters: dict[str, dict[str, Any]]) -> Combination:
    """Create a combination.

    Args:
        names: Names of methods, each once.
        hyper_parameters: For each name, the fields that differ from the paper's values.

    Raises:
        ValueError: If a name is repeated or unknown, or has no such hyper-parameter.
    """
    joined = "+".join(names)
    if len(set(names)) < len(names):
        raise ValueError(f"A combination takes each method once, but got '{joined}'.")
    check_hyper_parameters(joined, hyper_parameters, names)
    for name, given in hyper_parameters.items():
        if not isinstance(given, dict):
            raise ValueError(f"'{joined}' takes the hyper-parameters of {name} as a dictionary, but got {given!r}.")
    return Combination(methods=tuple(get_method(name, **hyper_parameters.get(name, {})) for name in names))
