import pytest

from tfmq_export.errors import ConfigError
from tfmq_export.ptq.walk.effort import EFFORTS, NARROW, find_effort


def test_efforts_grow() -> None:
    fast, standard, paper = (find_effort(name, 4) for name in ("fast", "standard", "paper"))

    assert fast.rounding.iterations == 0  # no gradient step but LES
    assert fast.rounding.iterations < standard.rounding.iterations < paper.rounding.iterations
    assert fast.rows_per_timestep < standard.rows_per_timestep < paper.rows_per_timestep
    assert all(x.images >= x.rows_per_timestep for x in (*EFFORTS.values(), *NARROW.values()))  # no sample twice


@pytest.mark.parametrize("name", EFFORTS)
def test_narrow_weights_get_at_least_as_much(name: str) -> None:
    narrow, wide = (find_effort(name, bits) for bits in (4, 8))

    assert narrow.name == wide.name == name
    assert narrow.rounding.iterations >= wide.rounding.iterations
    assert narrow.images >= wide.images
    assert (narrow == wide) is (name == "paper")
    assert narrow.scaling.iterations >= wide.scaling.iterations


def test_an_unknown_effort_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown effort 'quick'; there is fast, standard, paper"):
        find_effort("quick", 8)
