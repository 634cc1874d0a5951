import pytest
import torch
from nets.handwritten import denoiser_of, probe, silent
from torch import Tensor, nn

from tfmq_export.capture.denoiser import Conditioning, Denoise, Denoiser, Sampler
from tfmq_export.errors import CalibrationError
from tfmq_export.ptq.image_gain import WINDOWS, Windows, image_gain, weights_from
from tfmq_export.ptq.walk.calibration import calibrate, pick_rows, shares

FACTORS = (0.5, 2.0, 0.1, 1.0)
IMAGES = 8
rows: list[int] = []  # of every call of a module, its coarse copies among them


@pytest.fixture(autouse=True)
def _nothing_called() -> None:
    rows.clear()


class Same(nn.Module):
    """Predicts the same whatever it is given, so that an error reaches the image by the sampler's factors alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        rows.append(len(sample))
        return self.conv(torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8).expand_as(sample))


def factors(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
    x = noise
    for timestep, factor in zip((7, 5, 3, 1), FACTORS, strict=True):
        x = x - factor * denoise(x, timestep)
    return x


def of_four(sampler: Sampler) -> Denoiser:
    return probe(Same(), timesteps=[7, 5, 3, 1], sampler=sampler)


def measure(denoiser: Denoiser, images: int = IMAGES, most: int = WINDOWS) -> Tensor:
    calls = calibrate(denoiser, images=images, seed=0, progress=silent)
    rows.clear()
    return image_gain(denoiser, calls, images=images, seed=0, progress=silent, most=most)


def test_the_gain_is_the_square_of_what_the_sampler_does_to_an_error() -> None:
    assert measure(of_four(factors)).tolist() == pytest.approx([factor**2 for factor in FACTORS], rel=1e-3)


def test_only_the_disturbed_image_is_computed_and_only_from_its_disturbance_on() -> None:
    measure(of_four(factors))

    assert rows == [1] * (4 + 3 + 2 + 1)


@pytest.mark.parametrize("images", [1, 2, 3, 5, 8, 32])
def test_all_runs_together_cost_at_most_half_of_the_calibration(images: int) -> None:
    times = list(range(40, 0, -1))

    def walk(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        for timestep in times:
            noise = noise - denoise(noise, timestep) / 40
        return noise

    measure(probe(Same(), timesteps=times, sampler=walk), images)

    assert 0 < sum(rows) <= images * len(times) / 2


def test_guidance_disturbs_both_halves_of_an_image() -> None:
    def guided(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        def combined(x: Tensor, timestep: int) -> Tensor:
            without, given = denoise(torch.cat([x, x]), timestep).chunk(2)
            return without + 3 * (given - without)

        return factors(combined, noise, conditioning)

    # One half alone would move the image by -2 or 3 times its error.
    assert measure(of_four(guided)).tolist() == pytest.approx([factor**2 for factor in FACTORS], rel=1e-3)


def test_errors_that_repeat_add_up_before_they_are_measured() -> None:
    gain = measure(of_four(factors), most=1)

    # The same error e at every step: the image moves by 3.6 e, at the price of four errors.
    assert gain.tolist() == pytest.approx([sum(FACTORS) ** 2 / 4] * 4, rel=1e-3)


def test_the_model_itself_is_left_as_it_was() -> None:
    denoiser = of_four(factors)
    before = {name: value.clone() for name, value in denoiser.module.state_dict().items()}

    measure(denoiser)

    assert all(torch.equal(denoiser.module.state_dict()[name], value) for name, value in before.items())


def test_noise_that_the_sampler_draws_itself_is_no_gain() -> None:
    def ancestral(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        return factors(denoise, noise + torch.randn(noise.shape), conditioning) + torch.randn(noise.shape)

    denoiser = of_four(ancestral)
    before = torch.random.get_rng_state()

    gain = measure(denoiser)

    assert gain.tolist() == pytest.approx([factor**2 for factor in FACTORS], rel=1e-3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_timestep_visited_twice_has_the_mean_of_its_gains() -> None:
    def twice(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        x = noise - 1.0 * denoise(noise, 3)
        return x - 3.0 * denoise(x, 3) - 2.0 * denoise(x, 1)

    assert measure(probe(Same(), timesteps=[3, 1], sampler=twice)).tolist() == pytest.approx([5.0, 4.0], rel=1e-3)


def test_images_that_are_not_finite_are_refused_with_a_way_out() -> None:
    def wild(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        return factors(denoise, noise, conditioning) * float("inf")

    with pytest.raises(CalibrationError, match=r'NaN or infinity.*timestep_weights = "uniform"'):
        measure(of_four(wild))


def test_a_sampler_that_never_draws_the_same_twice_is_refused_with_a_way_out() -> None:
    drawn = iter(range(100))

    def restless(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        return factors(denoise, noise + next(drawn), conditioning)

    with pytest.raises(CalibrationError, match=r'another image in a second run.*timestep_weights = "uniform"'):
        measure(of_four(restless))


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


@pytest.mark.parametrize("calls", [1, 2, 3, 20])
@pytest.mark.parametrize("recorded", [1, 2, 8])
def test_there_is_a_call_to_disturb_however_short_the_run(calls: int, recorded: int) -> None:
    windows = list(Windows.within(calls, recorded, 10))

    assert windows
    assert windows[-1].stop == calls
    assert all(len(window) for window in windows)
