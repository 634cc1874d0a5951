import pytest
import torch
from nets.handwritten import denoiser_of, probe, silent
from torch import Tensor, nn

from tfmq_export.capture.denoiser import Conditioning, Denoise
from tfmq_export.errors import CalibrationError
from tfmq_export.ptq.image_gain import image_gain, weights_from
from tfmq_export.ptq.walk.calibration import calibrate, pick_rows, shares

FACTORS = (0.5, 2.0, 0.1, 1.0)


class Same(nn.Module):
    """Predicts the same whatever it is given, so that an error reaches the image by the sampler's factors alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.calls: list[None] = []  # a coarse copy of the module gets a list of its own

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        self.calls.append(None)
        return self.conv(torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8).expand_as(sample))


def factors(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
    x = noise
    for timestep, factor in zip((7, 5, 3, 1), FACTORS, strict=True):
        x = x - factor * denoise(x, timestep)
    return x


def test_the_gain_is_the_square_of_what_the_sampler_does_to_an_error() -> None:
    denoiser = probe(Same(), timesteps=[7, 5, 3, 1], sampler=factors)

    gain = image_gain(denoiser, seed=0, progress=silent)

    assert gain.tolist() == pytest.approx([factor**2 for factor in FACTORS], rel=1e-3)


def test_steps_before_the_disturbance_are_replayed() -> None:
    module = Same()
    denoiser = probe(module, timesteps=[7, 5, 3, 1], sampler=factors)
    module.calls.clear()

    image_gain(denoiser, seed=0, progress=silent)

    assert len(module.calls) == 4 + (4 + 3 + 2 + 1)


def test_errors_that_repeat_add_up_before_they_are_measured() -> None:
    denoiser = probe(Same(), timesteps=[7, 5, 3, 1], sampler=factors)

    gain = image_gain(denoiser, seed=0, progress=silent, windows=1)

    # The same error e at every step: the image moves by 3.6 e, at the price of four errors.
    assert gain.tolist() == pytest.approx([sum(FACTORS) ** 2 / 4] * 4, rel=1e-3)


def test_the_model_itself_is_left_as_it_was() -> None:
    module = Same()
    before = {name: value.clone() for name, value in module.state_dict().items()}

    image_gain(probe(module, timesteps=[7, 5, 3, 1], sampler=factors), seed=0, progress=silent)

    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())


def test_noise_that_the_sampler_draws_itself_is_no_gain() -> None:
    def ancestral(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        return factors(denoise, noise, conditioning) + torch.randn(noise.shape)

    denoiser = probe(Same(), timesteps=[7, 5, 3, 1], sampler=ancestral)
    before = torch.random.get_rng_state()

    gain = image_gain(denoiser, seed=0, progress=silent)

    assert gain.tolist() == pytest.approx([factor**2 for factor in FACTORS], rel=1e-3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_timestep_visited_twice_has_the_mean_of_its_gains() -> None:
    def twice(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        x = noise - 1.0 * denoise(noise, 3)
        return x - 3.0 * denoise(x, 3) - 2.0 * denoise(x, 1)

    denoiser = probe(Same(), timesteps=[3, 1], sampler=twice)

    assert image_gain(denoiser, seed=0, progress=silent).tolist() == pytest.approx([5.0, 4.0], rel=1e-3)


def test_images_that_are_not_finite_are_refused_with_a_way_out() -> None:
    def wild(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        return factors(denoise, noise, conditioning) * float("inf")

    with pytest.raises(CalibrationError, match='timestep_weights = "uniform"'):
        image_gain(probe(Same(), timesteps=[7, 5, 3, 1], sampler=wild), seed=0, progress=silent)


def test_weights_have_mean_one_and_forget_no_timestep() -> None:
    weights = weights_from(torch.tensor([100.0, 1.0, 0.0], dtype=torch.float64))

    assert float(weights.mean()) == pytest.approx(1)
    assert weights[0] > weights[1] > 0
    assert weights[2] == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("most", [3, 8, 64])
def test_shares_keep_the_budget_and_the_proportions(most: int) -> None:
    weights = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.001])

    counts = shares(weights, 8, most)

    assert counts == sorted(counts, reverse=True)
    assert min(counts) >= 1
    assert max(counts) <= most
    # The budget is spent unless there are too few samples; each count is rounded.
    assert sum(counts) == pytest.approx(min(8 * 5, most * 5), abs=2.5) or counts[:2] == [most, most]
    if most == 64:
        assert counts[0] == pytest.approx(2 * counts[1], abs=1.5)


def test_timesteps_that_count_alike_have_as_many_samples_each() -> None:
    assert shares(torch.ones(50), 8, 16) == [8] * 50
    assert shares(torch.ones(50), 8, 3) == [3] * 50


def test_rows_are_as_many_as_a_timestep_counts() -> None:
    denoiser = denoiser_of("film_unet")
    steps = calibrate(denoiser, images=6, seed=0, progress=silent)
    weights = torch.ones(len(denoiser.timesteps))
    weights[0] = 100

    rows = pick_rows(denoiser, steps, 2, weights)

    counts = torch.bincount(rows.steps, minlength=len(weights))
    assert counts[1:].tolist() == [1] * (len(weights) - 1)
    assert counts[0] == min(6, 2 * len(weights) - (len(weights) - 1))
