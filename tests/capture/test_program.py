from collections.abc import Callable

import pytest
import torch
from nets import handwritten
from nets.handwritten import captured, probe
from torch import Tensor, nn
from torch.nn import functional

from tfmq_export.capture.dependences import SAMPLE, TIMESTEP, dependences
from tfmq_export.capture.program import DiffusionProgram, capture, evaluate
from tfmq_export.errors import ExportError


class Probe(nn.Module):
    """Two convolutions around whatever ``middle`` does with the hidden state and the timestep."""

    def __init__(self, middle: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.middle = middle or (lambda h, t: h * (1 + t.float().cos())[:, None, None, None])

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.leave(self.middle(self.enter(sample), timestep))


def paths(program: DiffusionProgram) -> list[str]:
    return [op.path for op in program.operations]


def test_each_values_roles_are_those_of_the_data_that_reaches_it() -> None:
    denoiser, program = captured("dit")

    depends = dependences(program.module.graph, program.roles)

    by_path = {op.path: op for op, _ in program.left_float} | {op.path: op for op in program.operations}
    assert depends["z"] == {"sample"}
    assert depends[by_path["patchify"].name] == {"sample"}
    assert depends[by_path["blocks.0.modulation.1"].name] == {"timestep", "conditioning"}
    assert depends[by_path["blocks.0.qkv"].name] == {"sample", "timestep", "conditioning"}
    assert depends[by_path["head"].weight] == frozenset()
    assert program.roles == {"z": "sample", "t": "timestep", "y": "conditioning"}
    assert set(program.roles) == set(denoiser.example_inputs)


@pytest.mark.parametrize(
    "expand",
    [
        lambda h, t: h + t.float().cos().expand(h.shape[0])[:, None, None, None],
        lambda h, t: h + (t.float().cos() * torch.ones_like(h[:, 0, 0, 0]))[:, None, None, None],
    ],
    ids=["expand", "ones_like"],
)
def test_a_timestep_brought_to_the_batch_of_the_sample_still_depends_on_time_alone(expand: Callable) -> None:
    example = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor(3)}

    program = capture(probe(Probe(expand), example_inputs=example))

    assert len(program.features) == 1
    assert paths(program) == ["enter", "leave"]


def test_the_temporal_frontier_of_a_film_unet_is_where_scale_and_shift_meet_the_sample() -> None:
    _, program = captured("film_unet")

    found = {(feature.path, feature.per_sample) for feature in program.features}

    # ``scale + 1``, computed in each block, and the projection itself for the shift: a table is taken in front
    # of the layout operations that cut the shift out of it.
    blocks = ("down", "mid", "up")
    assert found == {(block, True) for block in blocks} | {(f"{block}.to_film.1", True) for block in blocks}
    assert len(program.features) == 6


def test_the_temporal_frontier_of_an_adaln_transformer_stops_where_labels_join() -> None:
    _, program = captured("dit")

    assert [(feature.path, feature.per_sample) for feature in program.features] == [("time.2", True)]


def test_preconditioning_scalars_of_a_0d_timestep_are_features_without_a_batch() -> None:
    _, program = captured("edm")

    shapes = {f.name: tuple(program_value(program, f.name).shape) for f in program.features}

    # c_skip, c_out and total (= 1 / c_in) are single numbers, the embedding is one vector.
    assert sorted(shapes.values()) == [(), (), (), (16,)]
    assert not any(feature.per_sample for feature in program.features)


def program_value(program: DiffusionProgram, name: str) -> Tensor:
    (node,) = (node for node in program.module.graph.nodes if node.name == name)
    return node.meta["val"]


class Renamed(nn.Module):
    """A net whose module names are whatever the test says."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.names = names
        modules = [nn.Conv2d(3, 4, 3, padding=1), nn.Linear(1, 4), nn.Linear(4, 4), nn.Conv2d(4, 3, 3, padding=1)]
        for name, module in zip(names, modules, strict=True):
            setattr(self, name, module)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        enter, embed, mix, leave = (getattr(self, name) for name in self.names)
        h = enter(sample) + embed(timestep.float()[:, None])[:, :, None, None]
        return leave(mix(h.movedim(1, -1)).movedim(-1, 1))


def test_module_names_decide_nothing() -> None:
    plain = capture(probe(Renamed(["enter", "time_embed", "mix", "leave"])))
    # Names that would fool a search for "time", "norm" or "conv".
    tricky = capture(probe(Renamed(["time_emb_proj", "conv_in", "timestep_norm", "emb_layers"])))

    assert paths(tricky) == ["time_emb_proj", "timestep_norm", "emb_layers"]
    assert [feature.path for feature in tricky.features] == ["conv_in"]
    for of in (lambda p: [(op.kind, op.macs, op.roles) for op in p.operations], lambda p: p.macs):
        assert of(tricky) == of(plain)
    assert [feature.per_sample for feature in tricky.features] == [feature.per_sample for feature in plain.features]


def test_a_weight_computed_from_weights_is_a_value() -> None:
    denoiser, program = captured("film_unet")
    conv = denoiser.module.down.first
    centred = conv.weight - conv.weight.mean((1, 2, 3), keepdim=True)
    expected = centred / (conv.weight.var((1, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt() / (8 * 9) ** 0.5

    (op,) = (op for op in program.operations if op.path == "down.first")

    torch.testing.assert_close(program.value(op.weight), expected)  # fp32, another order of operations


def test_what_stays_in_floating_point_says_why() -> None:
    def reasons(name: str) -> dict[str, str]:
        return {op.path: reason for op, reason in captured(name)[1].left_float}

    modulation = "modulation: computed once per image from timestep and conditioning"
    assert reasons("edm") == {"up": "no backend runs a transposed convolution in integers"}
    assert reasons("dit") == dict.fromkeys(
        ["blocks.0.modulation.1", "blocks.1.modulation.1", "final_modulation.1"], modulation
    )
    assert reasons("film_unet") == {}


def test_a_hypernetworks_layers_stay_float_and_say_so() -> None:
    class Hyper(Probe):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            h = functional.conv2d(sample, self.enter.weight * timestep.cos(), self.enter.bias, padding=1)
            return functional.conv2d(h, self.leave.weight, self.leave.bias * timestep, padding=1)

    example = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor(0.5)}

    program = capture(probe(Hyper(), timesteps=[0.5, 0.25], example_inputs=example))

    reasons = [reason for _, reason in program.left_float]
    assert reasons == ["its weight is computed from the timestep", "its bias is computed from the timestep"]
    assert program.operations == ()


def test_the_operations_are_every_layer_that_meets_the_sample() -> None:
    blocks = [f"blocks.{i}.{layer}" for i in range(2) for layer in ("qkv", "proj", "mlp.0", "mlp.2")]
    assert paths(captured("dit")[1]) == ["patchify", *blocks, "head"]
    assert paths(captured("edm")[1]) == ["enter", "down", "squeeze", "excite", "mix", "leave"]
    assert [op.kind for op in captured("edm")[1].operations] == ["conv", "conv", "linear", "linear", "conv", "conv"]


def test_macs_equal_a_hand_count() -> None:
    _, edm = captured("edm")
    _, dit = captured("dit")

    # Channels out * positions * channels in per group * kernel.
    assert {op.path: op.macs for op in edm.operations} == {
        "enter": 8 * 16 * 2 * 3,
        "down": 16 * 8 * 8 * 4,
        "squeeze": 16 * 8,
        "excite": 8 * 16,
        "mix": 16 * 8 * 8 * 3,
        "leave": 2 * 16 * 16 * 3,
    }
    up = 16 * 8 * 8 * 4  # a transposed convolution multiplies each of its inputs with the whole kernel
    assert [op.macs for op, _ in edm.left_float] == [up]
    assert edm.macs == sum(op.macs for op in edm.operations) + up
    tokens, dim = 16, 16
    layers = tokens * dim * (4 * 2 * 2 + 2 * (3 + 1 + 2 + 2) * dim + 16)
    modulation = dim * dim * (6 + 6 + 2)
    attention = 2 * 2 * tokens * tokens * dim  # two blocks, two products each
    assert sum(op.macs for op in dit.operations) == layers
    assert dit.macs == layers + modulation + attention  # the time MLP is a table


def test_the_fingerprint_changes_with_a_table_that_is_no_weight() -> None:
    def with_table(value: float) -> Probe:
        module = Probe()
        module.register_buffer("table", torch.full((4, 1, 1), value), persistent=False)
        module.middle = lambda h, t: h * module.table * (1 + t.float().cos())[:, None, None, None]
        return module

    one, again, other = (capture(probe(with_table(value))).fingerprint for value in (1.0, 1.0, 2.0))
    assert one == again != other


def test_the_fingerprint_is_stable_and_changes_with_one_weight() -> None:
    first, again, other = Probe(), Probe(), Probe()
    with torch.no_grad():
        other.leave.bias[0] += 1e-6

    prints = [capture(probe(module)).fingerprint for module in (first, again, other)]

    assert prints[0] == prints[1] != prints[2]


def test_the_captured_graph_computes_what_the_module_computes_at_any_batch() -> None:
    for name in handwritten.FACTORIES:
        denoiser, program = captured(name)
        sample = denoiser.noise(3, 5)
        inputs = denoiser.inputs(sample, denoiser.timesteps.values[1], denoiser.prompts(3))

        with torch.no_grad():
            expected, got = denoiser.module(**inputs), program.module(**inputs)

        torch.testing.assert_close(got, expected)  # decompositions reorder fp32 sums


def test_a_module_that_ignores_time_has_no_features() -> None:
    program = capture(probe(Probe(lambda h, t: functional.silu(h))))

    assert program.features == ()
    assert paths(program) == ["enter", "leave"]


@pytest.mark.parametrize(
    "wrap",
    [lambda y: (y, y.mean()), lambda y: {"prediction": y, "extra": y.exp()}, lambda y: [y]],
    ids=["tuple", "dict", "list"],
)
def test_the_prediction_is_the_first_tensor_and_nothing_else_is_compiled(wrap: Callable) -> None:
    class Wrapped(Probe):
        def forward(self, sample: Tensor, timestep: Tensor) -> object:
            h = self.enter(sample)
            self.middle(h, timestep)
            return wrap(self.leave(h))

    denoiser = probe(Wrapped())
    inputs = denoiser.inputs(denoiser.noise(2, 0), 3, {})

    program = capture(denoiser)

    assert program.features == ()  # time reached an unused value only
    torch.testing.assert_close(program.module(**inputs), Wrapped().leave(Wrapped().enter(inputs["sample"])))


def test_a_layer_keeps_its_value_when_the_exporter_would_fuse_it_away() -> None:
    class Fused(Probe):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            h = self.norm(self.enter(sample)) + timestep.float()[:, None, None, None]
            return self.leave(h) * 1.0

    program = capture(probe(Fused()))

    computed = {value for node in program.onnx.model_proto.graph.node for value in node.output}
    assert paths(program) == ["enter", "leave"]
    assert {op.name for op in program.operations} <= computed


def test_a_layer_called_twice_on_one_input_is_one_operation() -> None:
    program = capture(probe(Probe(lambda h, t: h * t.float()[:, None, None, None])))
    twice = Probe()
    twice.forward = lambda sample, timestep: (  # type: ignore[method-assign]  # a wrapper
        twice.leave(twice.enter(sample) * timestep.float()[:, None, None, None] + twice.enter(sample))
    )

    merged = capture(probe(twice))

    assert paths(merged) == paths(program)
    assert merged.macs == program.macs


def test_evaluate_computes_only_what_is_asked() -> None:
    _, program = captured("film_unet")
    (name,) = (feature.name for feature in program.features if feature.path == "down.to_film.1")
    (node,) = (node for node in program.module.graph.nodes if node.name == name)
    feeds = {"time": torch.tensor([300]), "x": torch.empty(0)}  # no convolution could run on this sample

    assert evaluate(program.module, [node], feeds)[node.name].shape == (1, 16)


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (lambda h, t: h.reshape(2, 4, 8, 8), "fixes the batch size"),
        (lambda h, t: h if h.mean() > 0 else -h, "data-dependent"),
        (lambda h, t: h * t[0].item() if t[0].item() > 1 else h, "data-dependent"),
    ],
    ids=["fixed batch", "branch on data", "branch on time"],
)
def test_what_cannot_be_captured_is_refused_with_the_reason(middle: Callable, message: str) -> None:
    with pytest.raises(ExportError, match=message) as error:
        capture(probe(Probe(middle)))

    assert "Probe" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_module_that_ignores_the_sample_is_refused() -> None:
    class Blind(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return timestep.float()[:, None, None, None].cos()

    with pytest.raises(ExportError, match="does not use its argument 'sample'"):
        capture(probe(Blind()))


def test_roles_have_names() -> None:
    _, program = captured("edm")

    assert program.roles == {"noisy": SAMPLE, "sigma": TIMESTEP}
