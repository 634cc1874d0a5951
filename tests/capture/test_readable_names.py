"""Values are called after modules, alike in PyTorch and in ONNX."""

import onnxruntime
import pytest
import torch
from nets.handwritten import probe
from torch import Tensor, fx, nn

from tfmq_export.capture.float_graph import float_graph
from tfmq_export.capture.program import DiffusionProgram, capture
from tfmq_export.errors import ExportError


class Named(nn.Module):
    """Modules called as a builtin, as a number, as an argument, and twice; functions between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.input = nn.Conv2d(3, 4, 1)
        self.act = nn.SiLU()
        self.blocks = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1)))
        self.embed = nn.Linear(1, 4)
        self.sample = nn.Conv2d(4, 4, 1)
        self.shared = nn.Conv2d(4, 4, 1)
        self.shared_1 = nn.Conv2d(4, 3, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = self.act(self.input(sample)) + self.embed(timestep.float()[:, None])[:, :, None, None]
        h = self.act(self.blocks(h)) * 0.5
        return self.shared_1(self.shared(self.shared(self.sample(h)).tanh()))


@pytest.fixture(scope="module")
def program() -> DiffusionProgram:
    return capture(probe(Named()))


def computed(program: DiffusionProgram) -> list[fx.Node]:
    return [node for node in program.module.graph.nodes if node.op == "call_function"]


def test_a_layer_is_called_as_its_module(program: DiffusionProgram) -> None:
    names = {op.path: op.name for op in program.operations}

    assert names["blocks.1.0"] == "blocks_1_0"
    assert names["input"] == "input_1"  # what Python calls input itself
    assert names["sample"] == "sample_1"  # the model's input has that name
    assert names["shared_1"] == "shared_1"
    assert [op.name for op in program.operations if op.path == "shared"] == ["shared_conv2d", "shared_conv2d_1"]
    assert [feature.name for feature in program.features] == ["embed"]


def test_what_no_module_computes_has_its_operation_behind_the_path(program: DiffusionProgram) -> None:
    assert {"act_silu", "act_silu_1"} <= {node.name for node in computed(program)}


def test_a_value_has_one_name_in_both_graphs(program: DiffusionProgram) -> None:
    proto = float_graph(program).proto
    names = [name for node in proto.graph.node for name in node.output]
    layers = {op.name for op in program.operations}

    assert len({*names}) == len(names)
    assert layers < {*names}
    assert {node.name for node in proto.graph.node} >= {f"node_{name}" for name in layers}


def test_names_move_no_number(program: DiffusionProgram) -> None:
    wanted = [op.name for op in program.operations]
    feeds = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([3, 5])}
    graph = float_graph(program)
    for name in wanted:
        if name not in {value.name for value in graph.proto.graph.output}:
            graph.proto.graph.output.append(type(graph.proto.graph.output[0])(name=name))
    session = onnxruntime.InferenceSession(graph.proto.SerializeToString())

    found = session.run(wanted, {name: value.numpy() for name, value in feeds.items()})

    env = fx.Interpreter(program.module, garbage_collect_values=False)
    env.run(*(feeds[node.target] for node in program.module.graph.nodes if node.op == "placeholder"))
    values = {node.name: value for node, value in env.env.items()}
    for name, value in zip(wanted, found, strict=True):
        torch.testing.assert_close(torch.from_numpy(value), values[name], rtol=1e-4, atol=1e-5)


def test_the_fingerprint_is_that_of_the_graph_as_it_was_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    # Goldens and recipes name it: another way to name values must not make another model of it.
    plain = capture(probe(Named())).fingerprint
    monkeypatch.setattr("tfmq_export.capture.program.readable_names", lambda *_: {})

    assert capture(probe(Named())).fingerprint == plain


class Parted(nn.Module):
    """Modules whose parameters, or whose own names, are what passes append and begin names with."""

    def __init__(self) -> None:
        super().__init__()
        self.ls, self.a, self.node_a = Scale(), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.embed = nn.Linear(1, 3)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.node_a(self.a(self.ls(sample)) + self.embed(timestep.float()[:, None])[:, :, None, None])


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3, 1, 1), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_no_name_is_that_of_a_module_whose_parameters_a_pass_could_hit() -> None:
    program = capture(probe(Parted()))

    assert {op.path: op.name for op in program.operations} == {"a": "a", "node_a": "_node_a"}
    assert "ls_1" in {node.name for node in computed(program)}  # "ls.scale" would be its grid's scale, and is a weight


def test_an_argument_with_a_name_of_pythons_own_is_refused() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.embed = nn.Conv2d(3, 3, 1), nn.Linear(1, 3)

        def forward(self, input: Tensor, timestep: Tensor) -> Tensor:  # noqa: A002
            return self.conv(input) + self.embed(timestep.float()[:, None])[:, :, None, None]

    inputs = {"input": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([3, 1])}

    with pytest.raises(ExportError, match="an argument 'input', which is a name of Python's own"):
        capture(probe(Asks(), sample="input", example_inputs=inputs))
