"""Small denoisers with prompts, as the exporter writes them and with their timesteps tabulated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from nets.onnx_graphs import graph_of, infer, normal
from nets.toy_nets import Feeds, Layer, Net, node
from numpy.typing import NDArray
from onnx import TensorProto

from tfmq_export.passes.base import run_passes
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.time.split_prologue import Split
from tfmq_export.passes.time.tabulate_tib import TabulateTib
from tfmq_export.recipe.recipe import TemporalTable, TibRecipe
from tfmq_export.recipe.timesteps import TimestepSet

ROLES = {"sample": "sample", "timestep": "timestep", "context": "conditioning", "label": "conditioning"}
CLASSES = 5
IMAGE = ("batch", 4, 4, 4)


@dataclass(frozen=True)
class PromptNet:
    """Sizes of a net that attends to a text and is modulated by label and timestep."""

    tokens: int = 3
    width: int = 8
    features: int = 6
    timesteps: tuple[int, ...] = (900, 500, 100)
    text: bool = True
    classes: bool = True
    per_sample: bool = True

    @property
    def roles(self) -> dict[str, str]:
        gone = {name for name, there in (("context", self.text), ("label", self.classes)) if not there}
        return {name: role for name, role in ROLES.items() if name not in gone}

    def graph(self, extra: Sequence[onnx.NodeProto] = (), constants: Mapping[str, NDArray] | None = None) -> gs.Graph:
        """The tabulated graph.

        Args:
            extra: Nodes from ``out``, [batch, 4, 4, 4], to ``y`` of the same shape.
            constants: What they read beside.
        """
        return self.tabulated(self.model(extra, constants))

    def tabulated(self, model: onnx.ModelProto) -> gs.Graph:
        frequencies = np.geomspace(1, 1e-3, self.features, dtype=np.float32)
        rows = np.sin(np.float32(self.timesteps)[:, None] * frequencies).astype(np.float32)
        table = TemporalTable("embedding", "net.embedding", rows, self.per_sample)
        graph = graph_of(model)
        run_passes(graph, [TabulateTib(TibRecipe(TimestepSet(self.timesteps), (table,)), "timestep", "sample")])
        return graph

    def model(
        self, extra: Sequence[onnx.NodeProto] = (), constants: Mapping[str, NDArray] | None = None
    ) -> onnx.ModelProto:
        d, f = self.width, self.features
        nodes = [
            node("Shape", "sample", "batch", start=0, end=1),
            node("Cast", "timestep", "real", to=TensorProto.FLOAT),
            *(
                [node("Expand", "real batch", "expanded")]
                if self.per_sample
                else [node("Identity", "real", "expanded")]
            ),
            node("Unsqueeze", "expanded one", "column"),
            node("Mul", "column frequencies", "angles"),
            node("Sin", "angles", "embedding" if self.per_sample else "waves"),
            *([] if self.per_sample else [node("Reshape", "waves flat", "embedding")]),
            node("Conv", "sample conv_in", "stem", pads=[1] * 4),
        ]
        trunk = "stem"
        if self.classes:
            nodes += [
                node("Gather", "classes label", "label_embedding", axis=0),
                node("Add", "embedding label_embedding", "joint"),
                node("Sigmoid", "joint", "joint_gate"),
                node("Mul", "joint joint_gate", "joint_silu"),
                node("Gemm", "joint_silu modulation modulation_bias", "modulated"),
                node("Unsqueeze", "modulated spatial", "image_wide"),
                node("Split", "image_wide", "scale shift", axis=1, num_outputs=2),
                node("Add", "scale unit", "scale_up"),
                node("Mul", "stem scale_up", "scaled"),
                node("Add", "scaled shift", "shifted"),
            ]
            trunk = "shifted"
        if self.text:
            nodes += [
                node("MatMul", "context w_k", "k"),
                node("MatMul", "context w_v", "v_raw"),
                node("Add", "v_raw b_v", "v"),
                node("Transpose", "k", "k_swapped", perm=[0, 2, 1]),
                node("Mul", "k_swapped root", "k_scaled"),
                node("Reshape", f"{trunk} as_tokens", "tokens"),
                node("Transpose", "tokens", "q", perm=[0, 2, 1]),
                node("MatMul", "q k_scaled", "scores"),
                node("Softmax", "scores", "weights", axis=-1),
                node("MatMul", "weights v", "attended"),
                node("Transpose", "attended", "back", perm=[0, 2, 1]),
                node("Reshape", "back as_image", "attention"),
                node("Add", f"{trunk} attention", "mixed"),
            ]
            trunk = "mixed"
        nodes += [node("Conv", f"{trunk} conv_out", "out"), *extra]
        own = {
            "one": np.array([1]),
            "flat": np.array([-1]),
            "spatial": np.array([2, 3]),
            "as_tokens": np.array([0, 4, 16]),
            "as_image": np.array([0, 4, 4, 4]),
            "frequencies": np.geomspace(1, 1e-3, f, dtype=np.float32).reshape(1, -1),
            "conv_in": normal(1, 4, 4, 3, 3),
            "classes": normal(2, CLASSES, f),
            "modulation": normal(3, f, 8),
            "modulation_bias": normal(4, 8),
            "unit": np.float32(1),
            "w_k": normal(5, d, 4),
            "w_v": normal(6, d, 4),
            "b_v": normal(7, 1, 1, 4),
            "root": np.float32(0.577),
            "conv_out": normal(8, 4, 4, 1, 1),
        }
        shapes = {"timestep": ("steps",), "context": ("batch", self.tokens, d), "label": ("batch",)}
        inputs = {"sample": IMAGE, **{name: shape for name, shape in shapes.items() if name in self.roles}}
        return denoiser(nodes, inputs, "y" if extra else "out", {**own, **(constants or {})})

    def feeds(self, batch: int, timesteps: Sequence[int], seed: int = 0) -> dict[str, NDArray]:
        rng = np.random.default_rng(seed)
        every = {
            "sample": normal(seed, batch, 4, 4, 4),
            "timestep": np.asarray(timesteps, np.int64),
            "context": normal(seed + 1, batch, self.tokens, self.width),
            "label": rng.integers(0, CLASSES, batch),
        }
        return {name: every[name] for name in self.roles}


class LabelNet(Net):
    """A net with class labels beside sample and timestep."""

    def feeds(self, timestep: float, batch: int = 3, seed: int = 0) -> Feeds:
        labels = np.random.default_rng(seed).integers(0, CLASSES, batch)
        return super().feeds(timestep, batch, seed) | {"label": labels}


def label_net() -> Net:
    """Two convolutions around a modulation by label and timestep."""
    net = PromptNet(text=False)
    model = net.model()
    kernels = {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}
    layers = {"stem": Layer("conv", "sample", kernels["conv_in"]), "out": Layer("conv", "shifted", kernels["conv_out"])}
    return LabelNet(model, layers, "embedding", True, TimestepSet(net.timesteps))


def denoiser(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    output: str,
    constants: Mapping[str, NDArray],
) -> onnx.ModelProto:
    """A checked model of images with the shapes the exporter would know; label and timestep are integers."""

    def declared(name: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
        kind = TensorProto.INT64 if name in ("label", "timestep") else TensorProto.FLOAT
        return onnx.helper.make_tensor_value_info(name, kind, shape)

    read = {name for item in nodes for name in item.input}
    graph = onnx.helper.make_graph(
        nodes,
        "test",
        [declared(name, shape) for name, shape in inputs.items()],
        [declared(output, IMAGE)],
        [onnx.numpy_helper.from_array(values, name) for name, values in constants.items() if name in read],
    )
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    inferred = onnx.shape_inference.infer_shapes(model)
    for info in inferred.graph.value_info:  # shape inference makes up a symbol where the exporter knows the batch
        dims = info.type.tensor_type.shape.dim
        if dims and not dims[0].HasField("dim_value") and info.name != "real":
            dims[0].dim_param = "batch"
    return inferred


def run_split(split: Split, feeds: dict[str, NDArray]) -> NDArray:
    """Prologue, then main graph."""
    prologue = export_model(split.prologue)
    names = [value.name for value in prologue.graph.output]
    passed = dict(zip(names, infer(prologue, pick(prologue, feeds)), strict=True))
    main = export_model(split.main)
    (result,) = infer(main, pick(main, {**feeds, **passed}))
    return result


def run_single(graph: gs.Graph, feeds: dict[str, NDArray]) -> NDArray:
    model = export_model(graph)
    (result,) = infer(model, pick(model, feeds))
    return result


def pick(model: onnx.ModelProto, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
    return {value.name: feeds[value.name] for value in model.graph.input}
