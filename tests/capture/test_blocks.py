from itertools import pairwise

import pytest
import torch
from nets.emoji import captured_example
from nets.handwritten import captured, probe
from torch import Tensor, nn

from tfmq_export.capture.blocks import Block, find_blocks, temporal_block
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.capture.dependences import TIMESTEP, dependences
from tfmq_export.capture.program import DiffusionProgram, capture, evaluate
from tfmq_export.ptq.walk.block_runner import BlockRunner, Compute

HANDWRITTEN = ("film_unet", "dit", "edm")
NETS = (*HANDWRITTEN, "emoji32")


def net(name: str) -> tuple[Denoiser, DiffusionProgram]:
    return captured(name) if name in HANDWRITTEN else captured_example(name)


def blocks_of(program: DiffusionProgram, *, served: bool = True) -> tuple[Block, ...]:
    features = [feature.name for feature in program.features] if served else []
    depends = dependences(program.module.graph, program.roles)
    return find_blocks(program.module.graph, depends, [op.name for op in program.operations], features)


def layers_by_path(program: DiffusionProgram) -> dict[str, str]:
    return {op.path: op.name for op in program.operations}


def modules(denoiser: Denoiser, *kinds: str) -> set[str]:
    """Paths of the modules of some classes, as the graph has them."""
    named = denoiser.module.named_modules()
    return {path.removeprefix("model.") for path, module in named if type(module).__name__ in kinds}


def inputs_of(denoiser: Denoiser, program: DiffusionProgram) -> dict[str, Tensor]:
    """Graph inputs and temporal features, one row per sample, as a walk holds them."""
    examples = denoiser.example_inputs
    count = len(examples[denoiser.sample])
    names = {feature.name: feature.per_sample for feature in program.features}
    nodes = [node for node in program.module.graph.nodes if node.name in names]
    with torch.no_grad():
        features = evaluate(program.module, nodes, examples)
    rows = {name: value if names[name] else value.expand(count, *value.shape) for name, value in features.items()}
    return rows | {name: value if value.ndim else value.expand(count) for name, value in examples.items()}


def result_name(program: DiffusionProgram) -> str:
    (output,) = program.module.graph.find_nodes(op="output")
    return output.args[0].name


def run(program: DiffusionProgram, blocks: tuple[Block, ...], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """All blocks in sequence; each sees what it says it reads, and no more."""
    values = dict(values)
    with torch.no_grad():
        for block in blocks:
            runner = BlockRunner(program.module, block)
            values |= runner({name: values[name] for name in block.reads}, {})
    return values


@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_every_layer_is_in_exactly_one_block_and_in_forward_order(name: str, served: bool) -> None:
    _, program = net(name)

    blocks = blocks_of(program, served=served)

    assert [layer for block in blocks for layer in block.layers] == [op.name for op in program.operations]
    assert all(block.layers for block in blocks)
    assert all(set(block.layers) <= set(block.nodes) for block in blocks)


@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_blocks_are_consecutive_runs_in_execution_order(name: str, served: bool) -> None:
    _, program = net(name)
    order = {node.name: position for position, node in enumerate(program.module.graph.nodes)}

    positions = [order[node] for block in blocks_of(program, served=served) for node in block.nodes]

    assert all(before < after for before, after in pairwise(positions))


@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_every_read_was_written_before_or_is_given(name: str, served: bool) -> None:
    denoiser, program = net(name)
    there = set(denoiser.example_inputs)
    if served:
        there |= {feature.name for feature in program.features}

    for block in blocks_of(program, served=served):
        assert set(block.reads) <= there, block.path
        assert set(block.writes) <= set(block.nodes)
        there |= set(block.writes)

    assert result_name(program) in there


@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_every_write_is_a_tensor_that_somebody_reads(name: str, served: bool) -> None:
    _, program = net(name)
    blocks = blocks_of(program, served=served)
    values = {node.name: node.meta.get("val") for node in program.module.graph.nodes}

    read = {name for block in blocks for name in block.reads} | {result_name(program)}

    for block in blocks:
        assert set(block.writes) <= read, block.path
        assert all(isinstance(values[write], Tensor) for write in block.writes), block.path


@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_the_blocks_in_sequence_are_the_captured_module(name: str, served: bool) -> None:
    denoiser, program = net(name)
    with torch.no_grad():
        expected = program.module(**denoiser.example_inputs)

    values = run(program, blocks_of(program, served=served), inputs_of(denoiser, program))

    found = values[result_name(program)]
    # The same operations on the same numbers, in the same order.
    torch.testing.assert_close(found, expected[0] if isinstance(expected, tuple) else expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["film_unet", "dit", "emoji32"])
def test_a_block_runs_any_number_of_rows(name: str) -> None:
    denoiser, program = net(name)
    blocks, values = blocks_of(program), inputs_of(denoiser, program)
    picks = torch.tensor([0, 1, 1, 0, 1])

    few, many = (
        run(program, blocks, each)[result_name(program)]
        for each in (values, {name: value[picks] for name, value in values.items()})
    )

    # Another batch size, another order of fp32 sums.
    torch.testing.assert_close(many, few[picks], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("film_unet", ["down", "mid", "up", "down_attention"]),
        ("dit", ["blocks.0", "blocks.1"]),
        ("emoji32", ["down_blocks.1.resnets.0", "down_blocks.1.attentions.0", "mid_block.resnets.1"]),
    ],
)
def test_residual_blocks_and_transformer_blocks_are_single_blocks(name: str, units: list[str]) -> None:
    _, program = net(name)
    by_path = {block.path: set(block.layers) for block in blocks_of(program)}

    for unit in units:
        inside = {layer for path, layer in layers_by_path(program).items() if path.startswith(f"{unit}.")}
        assert len(inside) >= 2
        assert by_path[unit] == inside


def test_the_diffusers_unet_has_a_block_for_every_residual_module() -> None:
    denoiser, program = net("emoji32")
    units = modules(denoiser, "ResnetBlock2D", "Attention")

    paths = {block.path for block in blocks_of(program)}

    assert len(units) >= 15
    assert units <= paths
    assert {"conv_in", "conv_out"} <= paths  # what is left is its own block


@pytest.mark.slow
def test_transformer_blocks_of_a_conditional_unet_are_not_cut_at_their_inner_residuals() -> None:
    denoiser, program = net("emoji32-cond")
    units = modules(denoiser, "BasicTransformerBlock")
    assert units  # otherwise this test says nothing
    quantized = layers_by_path(program)

    homes = {layer: block for block in blocks_of(program) for layer in block.layers}

    for unit in units:
        inside = [layer for path, layer in quantized.items() if path.startswith(f"{unit}.")]
        assert len(inside) == 10  # two attentions and a feed-forward network
        assert {homes[layer].path for layer in inside} == {unit}


def test_a_decoder_block_reads_the_skip_from_the_block_that_wrote_it() -> None:
    _, program = net("film_unet")
    by_path = {block.path: block for block in blocks_of(program)}
    graph = {node.name: node for node in program.module.graph.nodes}
    (concat,) = {graph[op.input] for op in program.operations if op.path in ("up.first", "up.skip")}
    deep, skip = (source.name for source in concat.args[0])

    up = by_path["up"]

    assert concat.name in up.nodes
    assert {deep, skip} <= set(up.reads)
    assert deep in by_path["grow.1"].writes
    assert skip in by_path["down_attention"].writes


def test_a_block_takes_what_it_reads_however_it_lies_in_memory() -> None:
    denoiser, program = net("dit")
    blocks, values = blocks_of(program), inputs_of(denoiser, program)
    expected = run(program, blocks, values)

    for block in blocks:
        # The same numbers with the axes behind the batch stored the other way round.
        turned = {name: value.mT.contiguous().mT if value.ndim > 2 else value for name, value in expected.items()}
        runner = BlockRunner(program.module, block)
        found = runner({name: turned[name] for name in block.reads}, {})
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_rules_stand_in_for_their_layer_and_no_other() -> None:
    denoiser, program = net("film_unet")
    block = next(block for block in blocks_of(program) if block.path == "up")
    values = run(program, blocks_of(program), inputs_of(denoiser, program))
    runner = BlockRunner(program.module, block)
    given = {name: values[name] for name in block.reads}
    skip = layers_by_path(program)["up.skip"]
    seen = []

    def silence(compute: Compute, operands: tuple[Tensor, ...]) -> Tensor:
        seen.append([tuple(operand.shape) for operand in operands])
        return 0 * compute(*operands)

    with torch.no_grad():
        plain, silenced = runner(given, {}), runner(given, {skip: silence})
        again = runner(given, {skip: lambda compute, operands: compute(*operands)})

    written = block.writes[-1]
    assert seen == [[(2, 16, 8, 8), (8, 16, 1, 1)]]
    assert torch.equal(again[written], plain[written])
    assert not torch.allclose(silenced[written], plain[written])


@pytest.mark.parametrize("name", ["film_unet", "dit", "edm", "emoji32"])
def test_the_temporal_block_leads_from_the_timestep_to_the_features(name: str) -> None:
    denoiser, program = net(name)
    graph = program.module.graph
    depends = dependences(graph, program.roles)
    features = [feature.name for feature in program.features]

    block = temporal_block(graph, features, [])

    assert denoiser.timestep in block.reads
    assert set(block.reads) <= set(denoiser.example_inputs)
    assert set(block.writes) == set(features)
    assert all(depends[node] <= {TIMESTEP} for node in block.nodes)


def test_a_net_without_residuals_falls_apart_into_its_layers() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)))

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.layers(sample) * timestep[:, None, None, None].float().cos()

    blocks = blocks_of(capture(probe(Chain())))

    assert [block.path for block in blocks] == [f"layers.{i}" for i in range(4)]
    assert [len(block.layers) for block in blocks] == [1] * 4


def test_a_residual_around_the_whole_model_does_not_swallow_it() -> None:
    class Residual(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(depth)))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layers(x)

    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.stage = Residual(3), Residual(20)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            h = self.stage(self.block(sample))
            return sample + h * timestep[:, None, None, None].float().cos()

    blocks = blocks_of(capture(probe(Stages())))

    assert [len(block.layers) for block in blocks] == [3, *[1] * 20]
