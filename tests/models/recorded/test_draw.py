"""Any module in its user's own sampler: whatever the sampler does, it works or is told in one line."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tfmq_export.capture.program import capture
from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.models.recorded.load import denoiser_from_draw
from tfmq_export.models.recorded.record import image_of
from tfmq_export.models.recorded.roles import Drawing
from tfmq_export.ptq.walk.calibration import record

LEVELS = (3.0, 2.0, 1.0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.time = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(1, 2)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.mix(x) + self.time(torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1))[..., None, None]


def noise(seed: int, images: int = 1) -> Tensor:
    return torch.randn(images, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def by_keyword(net: nn.Module, seed: int) -> Any:
    x = noise(seed)
    for level in LEVELS:
        x = x - 0.1 * net(x=x, t=torch.tensor([level]))
    return x


def in_place(net: nn.Module, seed: int) -> Any:
    x = noise(seed)
    for level in LEVELS:
        x -= 0.1 * net(x, torch.full((1,), level))
    return x[0].numpy()


def of_numbers(net: nn.Module, seed: int) -> Any:
    x = noise(seed)
    for level in LEVELS:
        x = x - 0.1 * net(x, level)
    return [x[0]]


def in_half_precision(net: nn.Module, seed: int) -> Any:
    x = noise(seed).half()
    for level in LEVELS:
        x -= 0.1 * net(x, torch.tensor([level]).half())
        assert x.dtype == torch.float16
    return x


def of_numpys_numbers(net: nn.Module, seed: int) -> Any:
    x = noise(seed)
    for level in np.array(LEVELS, np.float32):
        x = x - 0.1 * net(x, level)
    return x


def as_a_picture(net: nn.Module, seed: int) -> Any:
    return Image.fromarray((255 * by_keyword(net, seed)[0, 0].detach().sigmoid()).to(torch.uint8).numpy())


def with_autograd(net: nn.Module, seed: int) -> Any:
    x = noise(seed).requires_grad_()
    for level in LEVELS:
        x = (x - 0.1 * net(x, torch.tensor(level))).detach().requires_grad_()
    return x


def twice_a_step(net: nn.Module, seed: int) -> Any:
    x = noise(seed)
    for level in LEVELS:
        x = x - 0.05 * (net(x, torch.tensor([level])) + net(x + 0.1, torch.tensor([level])))
    return x


def built(draw: Callable[[nn.Module, int], Any]) -> tuple[nn.Module, Callable[[int], Any]]:
    torch.manual_seed(0)
    net = Net()
    return net, lambda seed: draw(net, seed)


@pytest.mark.parametrize("draw", [by_keyword, in_place, of_numbers, of_numpys_numbers, with_autograd, twice_a_step])
def test_a_sampler_draws_the_same_through_the_recording(draw: Callable[[nn.Module, int], Any]) -> None:
    net, code = built(draw)
    denoiser = denoiser_from_draw(net, code, None, "net")
    wanted = image_of(code(7000), "net").reshape(2, 6, 6)

    calls, images = record(denoiser, denoiser.module_denoise(), denoiser.runs(2, 7), lambda done, total: None)

    assert denoiser.timesteps.values == LEVELS
    assert torch.allclose(images[0], wanted, atol=1e-6)
    assert {len(call.inputs[denoiser.sample]) for call in calls} == {2}  # runs of one image, put together
    assert capture(denoiser).operations


class NamedAsPythonDoes(Net):
    def forward(self, input: Tensor, type: Tensor) -> Tensor:  # type: ignore[override]  # noqa: A002
        return super().forward(input, type)


def test_arguments_may_have_names_of_pythons_own() -> None:
    torch.manual_seed(0)
    net = NamedAsPythonDoes()
    denoiser = denoiser_from_draw(net, lambda seed: of_numbers(net, seed), None, "net")

    assert (denoiser.sample, denoiser.timestep) == ("input_", "type_")
    assert [operation.path for operation in capture(denoiser).operations] == ["mix"]


def test_a_drawing_names_the_arguments() -> None:
    net, code = built(by_keyword)

    denoiser = denoiser_from_draw(net, Drawing(code, timestep="t"), None, "net")

    assert (denoiser.sample, denoiser.timestep) == ("x", "t")
    with pytest.raises(ConfigError, match="net: x is no timestep: one number in each call"):
        denoiser_from_draw(net, Drawing(code, timestep="x"), None, "net")


def test_a_half_precision_sampler_is_followed_in_single_precision() -> None:
    net, code = built(in_half_precision)
    denoiser = denoiser_from_draw(net.half(), code, None, "net")

    calls, images = record(denoiser, denoiser.module_denoise(), denoiser.runs(2, 7), lambda done, total: None)

    assert {value.dtype for call in calls for value in call.inputs.values()} == {torch.float32}
    wanted = by_keyword(net.float(), 7000)
    assert torch.allclose(images[0], wanted[0], atol=0.01)  # the sampler itself rounds


class Embedded(Net):
    """Reads a text in half precision, and casts it itself."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, t) + text.float().mean(1)[:, None, None, None]


def test_a_text_in_half_precision_leaves_the_prediction_as_it_is() -> None:
    torch.manual_seed(0)
    net, kinds = Embedded(), []

    def code(seed: int) -> Tensor:
        x, text = noise(seed), torch.full((1, 3), 0.5 + seed % 2).half()
        for level in LEVELS:
            found = net(x, torch.tensor([level]), text)
            kinds.append(found.dtype)
            x = torch.lerp(x, found, 0.1)
        return x

    denoiser = denoiser_from_draw(net, code, None, "net")

    assert set(kinds) == {torch.float32}
    assert {value.dtype for value in denoiser.example_inputs.values()} == {torch.float32}


def test_a_picture_of_pil_is_its_channels() -> None:
    net, code = built(as_a_picture)
    denoiser = denoiser_from_draw(net, code, None, "net")
    (run,) = denoiser.runs(1, 7)

    picture = run(denoiser.module_denoise())

    assert picture.shape == (1, 1, 6, 6)
    assert torch.allclose(picture[0, 0], 2 * by_keyword(net, 7000)[0, 0].sigmoid() - 1, atol=0.01)


def test_a_second_draw_of_a_seed_is_the_same_and_the_module_is_left_as_it_was() -> None:
    net, code = built(by_keyword)
    before = code(3)
    denoiser_from_draw(net, code, None, "net")
    assert torch.equal(code(3), before)
    assert "forward" not in net.__dict__


def raises(net: nn.Module, seed: int) -> Any:
    net(noise(seed), torch.tensor([1.0]))
    raise ZeroDivisionError("mine")


def nothing(net: nn.Module, seed: int) -> Any:
    by_keyword(net, seed)


def never_calls(net: nn.Module, seed: int) -> Any:
    return noise(seed)


def unseeded(net: nn.Module, seed: int) -> Any:
    x = torch.from_numpy(np.random.default_rng().standard_normal((1, 2, 6, 6), np.float32))
    for level in LEVELS:
        x = x - 0.1 * net(x, torch.tensor([level]))
    return x


def unseeded_on_the_way(net: nn.Module, seed: int) -> Any:
    x = noise(seed)
    for level in LEVELS:
        x = x - 0.1 * net(x, torch.tensor([level]))
        x = x + torch.from_numpy(np.random.default_rng().standard_normal((1, 2, 6, 6), np.float32))
    return x


def one_noise(net: nn.Module, seed: int) -> Any:
    return by_keyword(net, 0)


def as_many_steps_as_it_likes(net: nn.Module, seed: int) -> Any:
    x = noise(seed)
    for level in LEVELS[seed % 2 :]:
        x = x - 0.1 * net(x, torch.tensor([level]))
    return x


def two_forms(net: nn.Module, seed: int) -> Any:
    x = noise(seed)
    x = x - net(x, torch.tensor([2.0]))
    return x - net(x, torch.tensor([1.0]), cond=x)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (raises, "drawing raises ZeroDivisionError: mine"),
        (nothing, r"draw\(seed\) returned NoneType; return the image"),
        (never_calls, "drew an image without calling the model"),
        (unseeded, r"draw\(0\) starts from other noise each time"),
        (unseeded_on_the_way, r"draw\(0\) draws other noise on its way each time"),
        (one_noise, r"draw\(0\) and draw\(1\) start from the same noise"),
        (as_many_steps_as_it_likes, r"draw\(1\) walks other timesteps than draw\(0\); a bundle is for one schedule"),
        (two_forms, "the model is called in two forms, once with 2 arguments and once with 3"),
    ],
)
def test_a_sampler_that_cannot_be_recorded_is_told_why(draw: Callable[[nn.Module, int], Any], message: str) -> None:
    with pytest.raises((LoadError, ConfigError), match=message):
        denoiser_from_draw(*built(draw), None, "net")


def test_steps_are_the_samplers_own() -> None:
    assert len(denoiser_from_draw(*built(by_keyword), 3, "net").timesteps) == 3
    with pytest.raises(ConfigError, match=r"--steps 5, but draw\(\) visits 3 timesteps"):
        denoiser_from_draw(*built(by_keyword), 5, "net")


class Mixing(Net):
    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return super().forward(x, t) - x.mean(0)


def test_rows_that_depend_on_each_other_are_refused() -> None:
    net = Mixing()
    with pytest.raises(LoadError, match="rows that do not depend on each other"):
        denoiser_from_draw(net, lambda seed: by_keyword(net, seed), None, "net")


def test_pictures_from_black_at_0_are_scaled_to_the_models_own_range() -> None:
    net = Net()

    def draw(seed: int) -> Tensor:
        return (by_keyword(net, seed).clamp(-1, 1) + 1) / 2

    def three(seed: int) -> Tensor:  # channels, as a picture has
        return draw(seed)[:, [0, 1, 1]]

    denoiser = denoiser_from_draw(net, three, None, "net")

    _, images = record(denoiser, denoiser.module_denoise(), denoiser.runs(2, 7), lambda done, total: None)
    torch.testing.assert_close(images[0], 2 * three(7000)[0] - 1, rtol=1e-5, atol=1e-5)


def test_a_signal_in_a_batch_of_one_is_no_picture() -> None:
    class Signal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv1d(3, 3, 3, padding=1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.mix(x) * t[:, None, None]

    net = Signal()

    def draw(seed: int) -> Tensor:
        x = torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(seed))
        for level in LEVELS:
            x = x - 0.1 * net(x, torch.tensor([level]))
        return x.sigmoid()

    denoiser = denoiser_from_draw(net, draw, None, "net")

    _, images = record(denoiser, denoiser.module_denoise(), denoiser.runs(2, 7), lambda done, total: None)
    assert images.shape == (2, 3, 12)
    torch.testing.assert_close(images[0], draw(7000)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [None, 0.0])
def test_an_argument_that_is_not_always_a_tensor_is_told_so(first: float | None) -> None:
    """Self-conditioning: the last prediction, and None in front of the first."""
    net = Net()

    def draw(seed: int) -> Tensor:
        x, last = noise(seed), first
        for level in LEVELS:
            answer = net(x, torch.tensor([level]), last)
            x, last = x - 0.1 * answer, answer
        return x

    said = "is None in one call and a tensor in another" if first is None else "is no tensor and changes"
    with pytest.raises(LoadError, match=f"argument cond {said}"):
        denoiser_from_draw(net, draw, None, "net")


class TwoPredictions(Net):
    """A picture's and, behind it, another's of half its height: LTX-2 predicts video and sound."""

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        h = super().forward(x, t)
        return h, h[:, :, :3]


def test_code_that_reads_a_second_prediction_is_told_that_there_is_one() -> None:
    net = TwoPredictions()

    def draw(seed: int) -> Tensor:
        x = noise(seed)
        for level in LEVELS:
            first, second = net(x, torch.tensor([level]))
            x = x - 0.1 * first - 0.01 * second.mean()
        return x

    with pytest.raises(LoadError, match=r"returns 2 tensors, of shapes \[1, 2, 6, 6\], \[1, 2, 3, 6\]"):
        denoiser_from_draw(net, draw, None, "net")
