"""What is everywhere is told from ties, which are here and there."""

from collections.abc import Sequence

import numpy as np

from tfmq_export.proof.agreement import Agreement, Differing
from tfmq_export.proof.systematic import CHANNEL, LAYER, channel_excess, layer_share


def calls(
    counts: Sequence[int], results: int = 100, reach: int = 1, times: int = 4, *, alike: bool = False
) -> list[Agreement]:
    """The same layer, called so many times.

    Args:
        alike: Whether all calls have the same result.
    """
    found = [Differing(np.asarray(counts), results, reach, 0 if alike else call) for call in range(times)]
    return [Agreement(60.0, 40.0, 1.0, 0.001, "layer", {"layer": each}) for each in found]


def test_a_channel_that_is_wrong_stands_out() -> None:
    found = calls([0, 1, 60, 0])

    assert channel_excess(found).max() > CHANNEL
    assert layer_share(found).max() == 0


def test_ties_that_move_all_channels_alike_do_not() -> None:
    found = calls([20, 21, 19, 20])

    assert channel_excess(found).max() < CHANNEL
    assert layer_share(found).max() < LAYER


def test_an_input_that_is_computed_in_another_way_is_a_layer_that_differs() -> None:
    assert layer_share(calls([90, 95, 92, 91])).max() > LAYER


def test_two_ties_on_a_map_of_a_few_pixels_are_no_fault() -> None:
    # Each moves all nine results that a kernel of 3 x 3 reaches, here of 16.
    assert channel_excess(calls([0, 16, 0], results=16, reach=9, times=1)).max() == 0
    assert channel_excess(calls([0, 16, 0], results=16, reach=9, times=4)).max() > CHANNEL


def test_a_tie_that_every_call_repeats_is_one_tie() -> None:
    # The embedding of a guidance scale: two rows, the same at every step.
    assert layer_share(calls([2, 2, 2], results=2, times=3, alike=True)).max() == 0
    assert layer_share(calls([2, 2, 2], results=2, times=3)).max() > LAYER


def test_a_model_without_quantized_layers_has_none() -> None:
    nothing = [Agreement(60.0, 40.0, 0.0, 0.0, "")]

    assert channel_excess(nothing).tolist() == layer_share(nothing).tolist() == [0.0]
