"""Pins: which layers a pattern names, and who wins."""

import re

import pytest

from tfmq_export.config import LayerPins
from tfmq_export.errors import ConfigError
from tfmq_export.ptq.walk.widths import pinned

NAMES = {
    "conv2d": "conv_in",
    "conv2d_1": "down.0.conv1",
    "conv2d_2_part0": "up.0.conv_shortcut[0]",
    "conv2d_2_part1": "up.0.conv_shortcut[1]",
    "linear": "up.0.attention.to_q",
}


def pins(**asked: object) -> LayerPins:
    return LayerPins.model_validate(asked)


def test_a_pattern_names_layers_by_their_paths() -> None:
    found = pinned(NAMES, {"down.*": pins(weights=8), "*.to_?": pins(inputs=6)})

    assert {name: (each.weights, each.inputs) for name, each in found.items()} == {
        "conv2d_1": (8, None),
        "linear": (None, 6),
    }
    assert found["conv2d_1"].why == "pinned by down.*"


def test_a_layer_on_a_skip_concatenation_is_both_its_halves_or_the_one_that_is_named() -> None:
    both = pinned(NAMES, {"*.conv_shortcut": pins(weights=8)})
    first = pinned(NAMES, {"up.0.conv_shortcut[0]": pins(weights=8)})

    assert set(both) == {"conv2d_2_part0", "conv2d_2_part1"}
    assert set(first) == {"conv2d_2_part0"}


def test_the_last_pattern_wins_setting_by_setting() -> None:
    found = pinned(NAMES, {"*": pins(weights=4, inputs=6), "up.*": pins(weights=8), "up.0.att*": pins(inputs="float")})

    assert (found["conv2d"].weights, found["conv2d"].inputs) == (4, 6)
    assert (found["conv2d_2_part0"].weights, found["conv2d_2_part0"].inputs) == (8, 6)
    assert (found["linear"].weights, found["linear"].inputs) == (8, 0)


def test_weights_in_floating_point_are_no_layer_to_quantize() -> None:
    found = pinned(NAMES, {"*": pins(weights="float"), "conv_in": pins(weights=8)})

    assert {name for name, each in found.items() if each.is_float} == NAMES.keys() - {"conv2d"}


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("down.0.conv2", "did you mean 'down.0.conv1'"),
        ("*.conv_shortcutt", "did you mean 'up.0.conv_shortcut'?"),
        ("*.attentions.*", "did you mean 'up.0.attention.to_q'?"),
        ("zzz", "there is conv_in, down.0.conv1, up.0.conv_shortcut, ..."),
    ],
)
def test_a_pattern_that_matches_no_layer_names_near_ones(pattern: str, near: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f'[layers."{pattern}"] matches no layer')) as caught:
        pinned(NAMES, {"*": pins(weights=8), pattern: pins(weights=4)})
    assert near in str(caught.value)
