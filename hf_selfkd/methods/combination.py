"""Combinations of methods: the terms of all of them, each under its method's name."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..models.outputs import MultiExitOutput
from .base import Method


@dataclass(frozen=True, kw_only=True)
class Combination(Method, registered=False):
    """A combination of methods, as ``get_method("eed+lsh")`` returns it.

    Terms are named ``eed/logit``, ``lsh/hash`` and so on. The label loss is that of the first method; the term
    ``label`` of the others is left out.

    Args:
        methods: The methods, all with different names.
    """

    methods: tuple[Method, ...]

    @property
    def name(self) -> str:
        """The methods' names, joined by ``+``."""
        return "+".join(method.name for method in self.methods)

    @property
    def paper(self) -> str:
        """The URLs of the methods' papers, joined by commas."""
        return ", ".join(method.paper for method in self.methods)

    @property
    def detach_exits(self) -> bool:
        """True if no method needs the exits' gradients."""
        return all(method.detach_exits for method in self.methods)

    @property
    def reads_maps(self) -> bool:
        """True if any method reads them."""
        return any(method.reads_maps for method in self.methods)

    @property
    def reads_indices(self) -> bool:
        """True if any method reads them."""
        return any(method.reads_indices for method in self.methods)

    @property
    def min_exits(self) -> int:
        """The largest number of exits that one of the methods needs."""
        return max(method.min_exits for method in self.methods)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that every method can train."""
        return tuple(task for task in self.methods[0].tasks if all(task in method.tasks for method in self.methods))

    def check(self, model: nn.Module) -> None:
        """Raise ValueError if ``model`` cannot be trained with one of the methods."""
        for method in self.methods:
            method.check(model)

    def scaffold(self, model: nn.Module) -> "Scaffolds | None":
        """Return the methods' scaffolds by name, ``None`` if there are none."""
        scaffolds = {method.name: method.scaffold(model) for method in self.methods}
        scaffolds = {name: scaffold for name, scaffold in scaffolds.items() if scaffold is not None}
        return Scaffolds(scaffolds) if scaffolds else None

    def allocate(self, scaffold: "Scaffolds | None", num_images: int) -> None:
        """Make room in the scaffold of each method."""
        for method in self.methods:
            method.allocate(_part(scaffold, method), num_images)

    def remember(self, output: MultiExitOutput) -> None:
        """Keep what each method needs of an output."""
        for method in self.methods:
            method.remember(_output_for(method, output))

    def prepare(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> None:
        """Prepare the scaffold of each method, with ``model.scaffold`` set to it."""
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
            for name, term in method(_output_for(method, output), labels, epoch).items():
                if name != "label" or method is self.methods[0]:
                    terms[f"{method.name}/{name}"] = term
        return terms

    def detaches_exits(self, scaffold: "Scaffolds | None") -> bool:
        """True if no method needs the exits' gradients."""
        return all(method.detaches_exits(_part(scaffold, method)) for method in self.methods)

    def leaves_out_exits(self, output: MultiExitOutput) -> bool:
        """True if the first method does, because its label loss is the one that is kept."""
        return self.methods[0].leaves_out_exits(_output_for(self.methods[0], output))

    def metrics(self, output: MultiExitOutput) -> dict[str, Tensor]:
        """Return the metrics of all methods, each under its method's name."""
        return {
            f"{method.name}/{name}": value
            for method in self.methods
            for name, value in method.metrics(_output_for(method, output)).items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the joined name, and the hyper-parameters of each method under its name."""
        parts = {method.name: method.to_dict() for method in self.methods}
        return {"name": self.name} | {
            name: {key: value for key, value in part.items() if key != "name"} for name, part in parts.items()
        }


class Scaffolds(nn.ModuleDict):
    """Scaffolds of several methods by name."""

    def forward(self, pixel_values: Tensor, output: MultiExitOutput) -> dict[str, dict]:
        """Call each and return the results by name."""
        return {name: scaffold(pixel_values, output) for name, scaffold in self.items()}


def _part(scaffolds: Any, method: Method) -> Any:
    """Return the part of a method, ``None`` if it has no scaffold."""
    return scaffolds[method.name] if scaffolds is not None and method.name in scaffolds else None


def _output_for(method: Method, output: MultiExitOutput) -> MultiExitOutput:
    """Return the output as the method alone would see it."""
    return replace(output, scaffold=_part(output.scaffold, method))
