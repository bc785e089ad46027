"""Early exit as one ONNX graph: nested ``If`` nodes, in which the network continues with the images that are left.

``If`` an image is left after an exit, its branch holds the rest of the network and, inside it, the next ``If``. All
weights are in the outer graph: in the branches, runtimes would hold them several times. But onnxruntime optimises a
convolution, which makes it several times faster, only if its constants are in its own graph. So a branch reads those
through a ``Reshape``, which onnxruntime computes when it loads the file.
"""

from collections.abc import Sequence

import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from .steps import Step


def write_step(step: Step) -> ModelProto:
    """Export one step for any batch size."""
    program = torch.onnx.export(step, step.examples, dynamic_shapes=step.dynamic_shapes, dynamo=True, verbose=False)
    return program.model_proto


# Operators whose constants onnxruntime looks for in their own graph, to change the layout of channels and to fuse.
LOCAL_CONSTANTS = ("Conv", "Clip")


class _Assembly:
    """Joins the graphs of all steps.

    Args:
        steps: One model per exit, first to final: logits, score, confidence and the inputs of the next.
        shrink: Whether the network continues with the remaining images only.
    """

    def __init__(self, steps: Sequence[ModelProto], shrink: bool):
        self.graphs = [onnx.compose.add_prefix(model, f"exit_{exit}/").graph for exit, model in enumerate(steps)]
        self.shrink = shrink
        self.constants: list[TensorProto] = []

    def constant(self, name: str, value: int | list[int]) -> str:
        """Add an int64 constant to the outer graph and return its name."""
        dims = [len(value)] if isinstance(value, list) else []
        if name not in (constant.name for constant in self.constants):
            flat = value if isinstance(value, list) else [value]
            self.constants.append(helper.make_tensor(name, TensorProto.INT64, dims, flat))
        return name

    def local_constants(self, graph: GraphProto) -> list[NodeProto]:
        """Rename weights of the outer graph, and return the nodes of a branch that read them under their old names."""
        names = {name for node in graph.node if node.op_type in LOCAL_CONSTANTS for name in node.input}
        nodes = []
        for tensor in graph.initializer:
            if tensor.name in names:
                name, dims = tensor.name, list(tensor.dims)
                tensor.name = f"{name}_stored"
                shape = self.constant("x".join(map(str, ["shape", *dims])), dims)
                nodes.append(helper.make_node("Reshape", [tensor.name, shape], [name], f"{name}_local"))
        return nodes

    def threshold(self, exit: int) -> NodeProto:
        """Return the node that reads the threshold of an exit, as a tensor of one element.

        A ``Gather`` would be taken for an embedding by onnxruntime's quantiser, which makes its table a constant.
        """
        bounds = [self.constant(f"position_{place}", [place]) for place in (exit, exit + 1)]
        return helper.make_node("Slice", ["thresholds", *bounds], [f"exit_{exit}/threshold"])

    def level(self, exit: int, inputs: Sequence[str], active: str | None = None) -> tuple[list[NodeProto], list[str]]:
        """Return the nodes from the inputs of a step to the end, and the names of logits, exit index and confidence.

        Args:
            exit: Index of the exit.
            inputs: Names of what the step takes.
            active: Name of the rows that have not exited, where the batch does not shrink.
        """
        graph, name = self.graphs[exit], f"exit_{exit}/".__add__
        nodes = _renamed(graph, inputs)
        if exit > 0:
            nodes = [*self.local_constants(graph), *nodes]
        logits, score, confidence, *crossing = (output.name for output in graph.output)
        nodes += [
            helper.make_node("Shape", [confidence], [name("rows")], name("count_rows")),
            helper.make_node("Expand", [self.constant(name("index"), exit), name("rows")], [name("exit_index")]),
        ]
        here = [logits, name("exit_index"), confidence]
        if exit == len(self.graphs) - 1:
            return nodes, here
        nodes += [
            self.threshold(exit),
            helper.make_node("GreaterOrEqual", [score, name("threshold")], [name("exits")]),
            helper.make_node("Not", [name("exits")], [name("stays")]),
        ]
        branch = self._shrinking if self.shrink else self._complete
        some_stay, then_nodes, then_outputs = branch(exit, here, crossing, active, nodes)
        outputs = [name(f"{kind}_so_far") for kind in ("logits", "index", "confidence")]
        types = [output.type for output in graph.output]
        types = [types[0], helper.make_tensor_type_proto(TensorProto.INT64, [None]), types[2]]
        nodes.append(
            helper.make_node(
                "If",
                [some_stay],
                outputs,
                name("continue"),
                then_branch=_branch(name("then"), then_nodes, then_outputs, types),
                else_branch=_branch(
                    name("else"),
                    [helper.make_node("Identity", [value], [f"{value}_here"]) for value in here],
                    [f"{value}_here" for value in here],
                    types,
                ),
            )
        )
        return nodes, outputs

    def _shrinking(self, exit, here, crossing, active, nodes):
        """Gather the rows that stay, continue with them, and scatter what comes out."""
        name = f"exit_{exit}/".__add__
        nodes += [
            helper.make_node("NonZero", [name("stays")], [name("stay_rows")]),
            helper.make_node("Squeeze", [name("stay_rows"), self.constant("axis_0", [0])], [name("stay")]),
            helper.make_node("Size", [name("stay")], [name("num_stay")]),
            helper.make_node("Greater", [name("num_stay"), self.constant("zero", 0)], [name("some_stay")]),
        ]
        kept = [f"{tensor}_kept" for tensor in crossing]
        gathers = [
            helper.make_node("Gather", [tensor, name("stay")], [keep], axis=0)
            for tensor, keep in zip(crossing, kept, strict=True)
        ]
        rest, deeper = self.level(exit + 1, kept)
        outputs = [name(f"{kind}_joined") for kind in ("logits", "index", "confidence")]
        scatters = [helper.make_node("Unsqueeze", [name("stay"), self.constant("axis_1", [1])], [name("places")])]
        scatters += [
            helper.make_node("ScatterND", [value, name("places"), update], [output])
            for value, update, output in zip(here, deeper, outputs, strict=True)
        ]
        return name("some_stay"), [*gathers, *rest, *scatters], outputs

    def _complete(self, exit, here, crossing, active, nodes):
        """Continue with all rows, and choose afterwards."""
        name = f"exit_{exit}/".__add__
        left = name("stays")
        if active is not None:
            left = name("left")
            nodes.append(helper.make_node("And", [active, name("stays")], [left]))
        nodes += [
            helper.make_node("Cast", [left], [name("left_count")], to=TensorProto.INT32),
            helper.make_node("ReduceMax", [name("left_count")], [name("any_left")], keepdims=0),
            helper.make_node("Cast", [name("any_left")], [name("some_stay")], to=TensorProto.BOOL),
            helper.make_node("Unsqueeze", [name("stays"), self.constant("axis_1", [1])], [name("stays_column")]),
        ]
        rest, deeper = self.level(exit + 1, crossing, left)
        outputs = [name(f"{kind}_joined") for kind in ("logits", "index", "confidence")]
        conditions = [name("stays_column"), name("stays"), name("stays")]
        choices = [
            helper.make_node("Where", [condition, update, value], [output])
            for condition, update, value, output in zip(conditions, deeper, here, outputs, strict=True)
        ]
        return name("some_stay"), [*rest, *choices], outputs

    def weights(self) -> list[TensorProto]:
        return [tensor for graph in self.graphs for tensor in graph.initializer]


def _renamed(graph: GraphProto, inputs: Sequence[str]) -> list[NodeProto]:
    """Return the nodes of a step, which read ``inputs`` in the place of the inputs of its graph."""
    new = {old.name: name for old, name in zip(graph.input, inputs, strict=True)}
    nodes = []
    for node in graph.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [new.get(name, name) for name in node.input]
        nodes.append(copy)
    return nodes


def _branch(name: str, nodes: Sequence[NodeProto], outputs: Sequence[str], types: Sequence) -> GraphProto:
    values = [helper.make_value_info(output, kind) for output, kind in zip(outputs, types, strict=True)]
    return helper.make_graph(nodes, name, [], values)


def assemble(
    steps: Sequence[ModelProto], thresholds: Sequence[float], metadata: dict[str, str], *, shrink: bool
) -> ModelProto:
    """Join the steps of all exits into one model.

    Args:
        steps: What :func:`write_step` returned for every exit, first to final.
        thresholds: Default of the input ``thresholds``, one per auxiliary exit.
        metadata: Stored in the file, by name.
        shrink: Whether the network continues with the remaining images only, or with all until the last has exited,
            for runtimes without shapes that depend on data.

    Returns:
        A model from ``pixel_values`` ``(batch, channels, height, width)`` and ``thresholds`` to ``logits``
        ``(batch, classes)``, ``exit_index`` ``(batch,)`` in int64 and ``confidence`` ``(batch,)``.
    """
    assembly = _Assembly(steps, shrink)
    first = assembly.graphs[0]
    nodes, outputs = assembly.level(0, ["pixel_values"])
    names = ["logits", "exit_index", "confidence"]
    nodes += [helper.make_node("Identity", [value], [name]) for value, name in zip(outputs, names, strict=True)]
    pixel_values = helper.make_value_info("pixel_values", first.input[0].type)
    defaults = helper.make_tensor("thresholds", TensorProto.FLOAT, [len(thresholds)], list(thresholds))
    classes = first.output[0].type.tensor_type.shape.dim[1].dim_value
    graph = helper.make_graph(
        nodes,
        "early_exit",
        [pixel_values, helper.make_tensor_value_info("thresholds", TensorProto.FLOAT, [len(thresholds)])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes]),
            helper.make_tensor_value_info("exit_index", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("confidence", TensorProto.FLOAT, ["batch"]),
        ],
        [defaults, *assembly.weights(), *assembly.constants],
    )
    model = helper.make_model(graph, opset_imports=steps[0].opset_import, ir_version=steps[0].ir_version)
    helper.set_model_props(model, metadata)
    return model
