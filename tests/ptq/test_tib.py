import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from nets.handwritten import EdmSignal, FilmUnet, TinyDit, captured, probe
from torch import Tensor, nn

from tfmq_export.capture.program import capture
from tfmq_export.errors import RecipeError
from tfmq_export.ptq.tib import tabulate


def film_projection(module: FilmUnet, t: Tensor) -> Tensor:
    return module.down.to_film(module.time_mlp(t))


def dit_time(module: TinyDit, t: Tensor) -> Tensor:
    angles = t[:, None] * module.frequencies
    return module.time(torch.cat((angles.cos(), angles.sin()), dim=-1))


def edm_embedding(module: EdmSignal, sigma: Tensor) -> Tensor:
    angles = (sigma.log() / 4)[:, None] * module.frequencies
    return torch.nn.functional.silu(module.embed(torch.cat((angles.cos(), angles.sin()), dim=-1)))


def in_float64(module: nn.Module, feature: Callable[..., Tensor], timesteps: object) -> Tensor:
    """The feature as the module would compute it in double precision throughout."""
    t = torch.tensor(timesteps)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            return feature(copy.deepcopy(module).double(), t.double() if t.is_floating_point() else t)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("name", "shape", "feature"),
    [
        ("film_unet", (4, 16), film_projection),
        ("dit", (3, 16), dit_time),
        ("edm", (5, 16), edm_embedding),
    ],
)
def test_tables_equal_the_modules_features(name: str, shape: tuple[int, ...], feature: Callable[..., Tensor]) -> None:
    denoiser, program = captured(name)
    expected = in_float64(denoiser.module, feature, denoiser.timesteps.values).numpy()

    tib = tabulate(program, denoiser)

    assert expected.shape == shape
    nearest = min(np.abs(table.rows - expected).max() for table in tib.tables if table.rows.shape == expected.shape)
    # One rounding to float32 of numbers near 1.
    assert nearest < 1e-6
    assert all(table.rows.dtype == np.float32 for table in tib.tables)


class Fast(nn.Module):
    """Angles of a hundred thousand, which float32 holds to a hundredth."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("frequencies", torch.tensor([7919.0, 104729.0, 1.0]))

    def feature(self, t: Tensor) -> Tensor:
        return (t.log()[:, None] * self.frequencies).sin()

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.conv(sample) + self.feature(timestep)[:, :, None, None]


def test_tables_are_evaluated_in_float64_from_the_timestep_on() -> None:
    denoiser = probe(Fast(), timesteps=[0.9, 0.4])
    values = denoiser.timesteps.values
    expected = in_float64(denoiser.module, Fast.feature, values).numpy()
    single = denoiser.module.feature(torch.tensor(values)).numpy()

    (table,) = tabulate(capture(denoiser), denoiser).tables

    np.testing.assert_allclose(table.rows, expected, rtol=0, atol=1e-6)  # float32 storage
    assert np.abs(single - expected).max() > 1e-4  # otherwise this test could not fail


def test_masks_and_indices_are_tabulated_too() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.table = nn.Conv2d(3, 3, 1), nn.Embedding(64, 3)

        def forward(self, sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
            h = self.conv(sample) + self.table(timestep * 10 + label)[:, :, None, None]
            return torch.where((timestep < 2)[:, None, None, None], h, -h)

    example = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([3, 1]), "label": torch.tensor([0, 1])}
    denoiser = probe(Gate(), example_inputs=example, conditioning={"label": torch.arange(2)})

    tables = tabulate(capture(denoiser), denoiser).tables

    assert sorted(table.rows.tolist() for table in tables) == [[0, 1], [30, 10]]


def test_a_schedule_the_time_embedding_cannot_take_is_refused() -> None:
    denoiser = probe(Fast(), timesteps=[0.5, 0.0])  # log(0)

    with pytest.raises(RecipeError, match="NaN or infinity"):
        tabulate(capture(denoiser), denoiser)


def test_two_runs_agree_to_the_last_bit() -> None:
    denoiser, program = captured("edm")

    first, again = tabulate(program, denoiser), tabulate(program, denoiser)

    assert [table.rows.tobytes() for table in first.tables] == [table.rows.tobytes() for table in again.tables]
