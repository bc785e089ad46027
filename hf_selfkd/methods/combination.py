"""Several methods at once: their terms side by side, each under its method's name."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..functional import cross_entropy
from ..outputs import MultiExitOutput
from .base import Method, check_hyper_parameters, get_method


@dataclass(frozen=True, kw_only=True)
class Combination(Method, registered=False):
    """Several methods at once, what ``get_method("eed+lsh")`` gives.

    Terms are called ``eed/logit``, ``lsh/hash`` and so on. Labels are learned as the first method has it: the term
    ``label`` of the others is left out.

    Args:
        methods: The methods, all of different names.
    """

    methods: tuple[Method, ...]

    @property
    def name(self) -> str:
        """The methods' names, joined by ``+``."""
        return "+".join(method.name for method in self.methods)

    @property
    def paper(self) -> str:
        """Where the methods are defined, URLs joined by commas."""
        return ", ".join(method.paper for method in self.methods)

    @property
    def detach_exits(self) -> bool:
        """Only if no method needs the exits' gradients."""
        return all(method.detach_exits for method in self.methods)

    @property
    def reads_maps(self) -> bool:
        """If any method does."""
        return any(method.reads_maps for method in self.methods)

    @property
    def min_exits(self) -> int:
        """Exits that the most demanding method needs."""
        return max(method.min_exits for method in self.methods)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError if ``model`` cannot be trained with one of the methods."""
        for method in self.methods:
            method.check(model)

    def scaffold(self, model: nn.Module) -> "Scaffolds | None":
        """Return the methods' scaffolds under their names, ``None`` if there are none."""
        scaffolds = {method.name: method.scaffold(model) for method in self.methods}
        scaffolds = {name: scaffold for name, scaffold in scaffolds.items() if scaffold is not None}
        return Scaffolds(scaffolds) if scaffolds else None

    def prepare(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> None:
        """Let each method prepare its own scaffold, which it finds in its usual place."""
        scaffolds = model.scaffold
        try:
            for method in self.methods:
                model.scaffold = _part(scaffolds, method)
                method.prepare(model, batches)
        finally:
            model.scaffold = scaffolds

    def __call__(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return the terms of all methods; ``output.scaffold`` holds one dictionary per method that has a scaffold."""
        terms = {}
        for method in self.methods:
            part = replace(output, scaffold=_part(output.scaffold, method))
            for name, term in method(part, labels, epoch).items():
                if name != "label" or method is self.methods[0]:
                    terms[f"{method.name}/{name}"] = term
        if self.methods[0].detach_exits and not self.detach_exits:
            # The label loss that stays knows the deepest exit only, and the trainer adds none to exits that teach.
            terms["exits"] = cross_entropy(output.exit_logits[:-1], labels)
        return terms

    def metrics(self, output: MultiExitOutput) -> dict[str, Tensor]:
        """Return what each method watches, each under its method's name."""
        return {
            f"{method.name}/{name}": value
            for method in self.methods
            for name, value in method.metrics(replace(output, scaffold=_part(output.scaffold, method))).items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the joined name, and the hyper-parameters of each method under its name."""
        parts = {method.name: method.to_dict() for method in self.methods}
        return {"name": self.name} | {
            name: {key: value for key, value in part.items() if key != "name"} for name, part in parts.items()
        }


class Scaffolds(nn.ModuleDict):
    """Scaffolds of several methods under their names."""

    def forward(self, pixel_values: Tensor, output: MultiExitOutput) -> dict[str, dict]:
        """Call each; the results lie under the methods' names too."""
        return {name: scaffold(pixel_values, output) for name, scaffold in self.items()}


def combine(names: list[str], hyper_parameters: dict[str, dict[str, Any]]) -> Combination:
    """Create a combination.

    Args:
        names: Names of methods, each once.
        hyper_parameters: For each name, the fields that differ from the paper's values.

    Raises:
        ValueError: If a name comes twice, is unknown or has no such hyper-parameter.
    """
    joined = "+".join(names)
    if len(set(names)) < len(names):
        raise ValueError(f"A combination names each method once, but got '{joined}'.")
    check_hyper_parameters(joined, hyper_parameters, names)
    for name, given in hyper_parameters.items():
        if not isinstance(given, dict):
            raise ValueError(f"'{joined}' takes the hyper-parameters of {name} as a dictionary, but got {given!r}.")
    return Combination(methods=tuple(get_method(name, **hyper_parameters.get(name, {})) for name in names))


def _part(scaffolds: Any, method: Method) -> Any:
    """Return what belongs to a method, ``None`` where it has no scaffold."""
    return scaffolds[method.name] if scaffolds is not None and method.name in scaffolds else None
