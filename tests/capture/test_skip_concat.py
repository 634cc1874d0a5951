import pytest
import torch
from nets.handwritten import denoiser_of, probe
from torch import Tensor, nn
from torch.nn import functional

from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.capture.dependences import dependences
from tfmq_export.capture.program import DiffusionProgram, capture
from tfmq_export.capture.rewrites.skip_concat import find_skip_concats, split_skip_concats
from tfmq_export.recipe.recipe import SkipSplit


class Concats(nn.Module):
    """Layers on concatenations that can be split, and on concatenations that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 3, 3, padding=1)
        self.three = nn.Conv2d(11, 4, 3, padding=1, stride=2)  # three halves
        self.grouped = nn.Conv2d(8, 4, 1, groups=4)
        self.tokens = nn.Linear(7, 6, bias=False)
        self.rows = nn.Linear(16, 3)
        self.alone = nn.Conv2d(4, 4, 1)  # behind a concatenation of one
        self.placed = nn.Conv2d(5, 4, 1)  # on coordinates beside the sample
        self.out = nn.Conv2d(4, 3, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        a, b = self.first(sample), self.second(sample)
        three = self.three(torch.cat((a, b, sample), dim=1))
        grouped = self.grouped(torch.cat((a, b), dim=1))
        flat = sample.flatten(2)  # [N, 3, 64]
        halves = flat[..., :3], three.flatten(2)[:, :3, :4]
        tokens = self.tokens(torch.cat(halves, dim=-1))
        along_rows = self.rows(torch.cat((a.flatten(2), b.flatten(2)), dim=1)[..., :16])
        extra = tokens.mean((1, 2)) + along_rows.mean((1, 2))
        side = torch.linspace(-1, 1, 8)
        places = torch.stack(torch.meshgrid(side, side, indexing="ij")).expand(len(sample), -1, -1, -1)
        placed = self.placed(torch.cat((sample, places), dim=1))
        h = self.out(
            functional.interpolate(three, scale_factor=2.0) + self.alone(torch.cat((grouped,), dim=1)) + placed
        )
        return h + extra[:, None, None, None] + timestep[:, None, None, None].float().cos()


def nets(name: str) -> tuple[Denoiser, DiffusionProgram]:
    """A capture of its own: nothing another test did to a shared one can hide here."""
    torch.manual_seed(0)
    denoiser = probe(Concats()) if name == "concats" else denoiser_of(name)
    return denoiser, capture(denoiser)


def predict(denoiser: Denoiser, program: DiffusionProgram) -> Tensor:
    with torch.no_grad():
        result = program.module(**denoiser.example_inputs)
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize(("name", "layers"), [("film_unet", 2), ("edm", 1), ("concats", 2)])
def test_splitting_changes_no_prediction(name: str, layers: int) -> None:
    denoiser, program = nets(name)
    before = predict(denoiser, program)
    splits = find_skip_concats(program)

    split = split_skip_concats(program, splits)

    assert len(splits) == layers
    # The same products, added up in another order of fp32.
    torch.testing.assert_close(predict(denoiser, split), before, rtol=1e-5, atol=1e-5)


def test_only_concatenations_along_the_channels_of_an_ungrouped_layer_are_split() -> None:
    _, program = nets("concats")
    by_path = {op.path: op.name for op in program.operations}

    splits = find_skip_concats(program)

    assert {(split.name, split.sizes) for split in splits} == {
        (by_path["three"], (5, 3, 3)),
        (by_path["tokens"], (3, 4)),
    }


@pytest.mark.parametrize("name", ["film_unet", "edm", "concats"])
def test_operations_are_replaced_by_halves_with_their_share_of_the_work(name: str) -> None:
    _, program = nets(name)
    whole = {op.name: op for op in program.operations}
    weights = {op.name: program.value(op.weight) for op in program.operations}
    splits = {split.name: split for split in find_skip_concats(program)}

    split = split_skip_concats(program, tuple(splits.values()))

    expected = [
        part
        for op in whole.values()
        for part in (
            [splits[op.name].part(i) for i in range(len(splits[op.name].sizes))] if op.name in splits else [op.name]
        )
    ]
    assert [op.name for op in split.operations] == expected  # in forward order, nothing lost
    halves = {op.name: op for op in split.operations}
    for skip in splits.values():
        parts = [halves[skip.part(index)] for index in range(len(skip.sizes))]
        before = whole[skip.name]
        assert [part.macs for part in parts] == [before.macs * size // sum(skip.sizes) for size in skip.sizes]
        # Kernels have a whole number of multiplications per channel: shares come out even.
        assert sum(part.macs for part in parts) == before.macs
        assert [part.bias for part in parts] == [before.bias, *[None] * (len(parts) - 1)]
        assert torch.equal(torch.cat([split.value(part.weight) for part in parts], dim=1), weights[skip.name])
        assert all(part.kind == before.kind and part.roles == before.roles for part in parts)


def test_halves_read_the_halves() -> None:
    _, program = nets("film_unet")
    nodes = {node.name: node for node in program.module.graph.nodes}
    splits = find_skip_concats(program)
    sources = {
        split.name: [source.name for source in nodes[op.input].args[0]]
        for split in splits
        for op in program.operations
        if op.name == split.name
    }

    halves = {op.name: op.input for op in split_skip_concats(program, splits).operations}

    for split in splits:
        assert [halves[split.part(index)] for index in range(2)] == sources[split.name]


def test_the_sum_takes_the_name_of_the_layer_so_that_readers_find_it() -> None:
    _, program = nets("film_unet")
    splits = find_skip_concats(program)

    module = split_skip_concats(program, splits).module

    nodes = {node.name: node for node in module.graph.nodes}
    for split in splits:
        total = nodes[split.name]
        assert total.target is torch.ops.aten.add.Tensor
        assert {source.name for source in total.all_input_nodes} == {split.part(0), split.part(1)}
        assert total.users
        assert total.meta["val"].shape[1:] == nodes[split.part(0)].meta["val"].shape[1:]


def test_the_halves_depend_on_what_the_whole_depended_on() -> None:
    _, program = nets("film_unet")
    splits = find_skip_concats(program)
    before = dependences(program.module.graph, program.roles)

    module = split_skip_concats(program, splits).module

    after = dependences(module.graph, program.roles)
    assert all(after[split.part(index)] for split in splits for index in range(2))
    assert {split.name: after[split.name] for split in splits} == {split.name: before[split.name] for split in splits}


def test_nothing_to_split_leaves_the_program_as_it_is() -> None:
    denoiser, program = nets("dit")
    before = predict(denoiser, program)

    split = split_skip_concats(program, find_skip_concats(program))

    assert split.operations == program.operations
    assert torch.equal(predict(denoiser, split), before)


def test_splitting_the_same_program_again_gives_the_same_operations() -> None:
    denoiser, program = nets("edm")
    splits = find_skip_concats(program)

    first = split_skip_concats(program, splits)
    prediction = predict(denoiser, first)
    again = split_skip_concats(program, splits)

    # The program it was made from is as it was.
    assert find_skip_concats(program) == splits
    assert {split.name for split in splits} <= {op.name for op in program.operations}
    assert [op.name for op in again.operations] == [op.name for op in first.operations]
    assert [op.input for op in again.operations] == [op.input for op in first.operations]
    assert torch.equal(predict(denoiser, again), prediction)


def test_parts_are_numbered() -> None:
    assert [SkipSplit("conv2d_9", (8, 8)).part(index) for index in range(2)] == ["conv2d_9_part0", "conv2d_9_part1"]


class TimeAsChannels(nn.Module):
    """The timestep beside the sample, as models of points and of sound have it."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(4, 5, 1), nn.Conv2d(5, 3, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        time = timestep.float().cos()[:, None, None, None].expand(-1, 1, 8, 8)
        return self.leave(self.enter(torch.cat((sample, time), dim=1)))


def test_a_concatenation_with_the_timestep_is_left_whole() -> None:
    assert find_skip_concats(capture(probe(TimeAsChannels()))) == ()
