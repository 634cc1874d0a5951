from dataclasses import replace

import numpy as np
import pytest
from nets.attention_graphs import product_recipes
from nets.onnx_graphs import normal
from nets.toy_recipes import activation_grid, layer_recipe, recipe_with, softmax_grid

from tfmq_export.errors import RecipeError
from tfmq_export.recipe.grid import QParams, QuantSpec
from tfmq_export.recipe.recipe import FloatLayer, LayerRecipe, TemporalTable, TibRecipe, TimestepGrids
from tfmq_export.recipe.timesteps import TimestepSet

X = activation_grid(np.float32([-1, 1]))
CONV = layer_recipe("conv2d", "conv", normal(0, 4, 3, 3, 3), X, X)
LINEAR = layer_recipe("linear", "linear", normal(0, 4, 3), X, bits=4)
BYTES = layer_recipe("linear", "linear", normal(0, 4, 3), X)


def grid(spec: QuantSpec, scale: object, zero_point: object) -> QParams:
    return QParams(spec, np.asarray(scale, np.float32), np.asarray(zero_point, np.int32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "conv_transpose"}, "unknown kind of layer 'conv_transpose'"),
        ({"weight_codes": CONV.weight_codes.astype(np.int32)}, "weight codes must be int8, got int32"),
        ({"weight": grid(QuantSpec(8, axis=0), [1.0] * 3, [0] * 3)}, "one scale per output channel"),
        ({"weight": grid(QuantSpec(8, axis=1), [1.0] * 4, [0] * 4)}, "one scale per output channel"),
        ({"weight": grid(QuantSpec(8), 1.0, 0)}, "one scale per output channel"),
        ({"weight": grid(QuantSpec(8, axis=0), [1.0] * 4, [0, 0, 0, 1])}, "weight zero points must be 0"),
        ({"weight": grid(QuantSpec(4, axis=0), [1.0] * 4, [0] * 4)}, "weight codes leave the 4-bit grid"),
    ],
)
def test_invalid_layers_cannot_exist(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=rf"net\.conv2d: .*{message}"):
        replace(CONV, **changes)


def paired(layer: LayerRecipe, rows: list[list[int]], **changes: object) -> LayerRecipe:
    """A layer of these integers whose grid says that no two neighbours add up to more than 128."""
    spec = replace(layer.weight.spec, pair_sum=128)
    codes = np.int8(rows).reshape(len(rows), -1, *[1] * (layer.weight_codes.ndim - 2))
    ones = np.ones(len(rows), np.float32)
    return replace(layer, weight=grid(spec, ones, np.zeros(len(rows))), weight_codes=codes, **changes)


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        ([[100, 28, -3, 5], [-128, 0, 127, -128]], {}),
        ([[64, 64, 64, 64], [-1, -127, -64, -64]], {}),
        ([[28, 100, 100, 28]], {}),  # the second and the third are no neighbours
        ([[64, -64, 64], [64, 64, 64]], {}),  # the last of an odd number
        ([[32, 32, 127, 1]], {"pts_exponent": np.int8([0, 0, -1, -1])}),
    ],
)
@pytest.mark.parametrize("layer", [CONV, BYTES])
def test_integers_up_to_what_their_grid_says_are_accepted(
    layer: LayerRecipe, rows: list[list[int]], changes: dict[str, object]
) -> None:
    assert paired(layer, rows, **changes).largest_pair == 128


@pytest.mark.parametrize(
    ("rows", "changes", "sum_"),
    [
        ([[100, 29, -3, 5], [1, 2, 3, 4]], {}, 129),
        ([[1, 2, 3, 4], [5, 5, -1, -128]], {}, 129),
        ([[127, 127, 0, 0]], {}, 254),
        ([[1, 2, 65]], {}, 130),  # whom the last of an odd number is beside depends on the kernel
        ([[32, 33, 127, 1]], {"pts_exponent": np.int8([0, 0, -1, -1])}, 130),
        ([[40, 40, 1, 1]], {"pts_exponent": np.int8([-1, 0, 0, -4])}, 960),
    ],
)
@pytest.mark.parametrize("layer", [CONV, BYTES])
def test_integers_that_break_the_pairs_of_their_grid_cannot_exist(
    layer: LayerRecipe, rows: list[list[int]], changes: dict[str, object], sum_: int
) -> None:
    message = rf"{layer.path}: two neighbouring weights add up to {sum_}, their grid says 128"
    with pytest.raises(RecipeError, match=message):
        paired(layer, rows, **changes)


def test_integers_of_a_grid_without_pairs_are_free() -> None:
    free = replace(CONV, weight_codes=np.full_like(CONV.weight_codes, 127))

    assert free.weight.spec.pair_sum is None
    assert free.largest_pair == 254


def test_shifts_alone_can_break_pairs() -> None:
    spec, exponent = QuantSpec(4, axis=0, pair_sum=128), np.int8([0, 0, -4, -4])
    codes = np.int8([[7, 2, 7, 7]])
    narrow = replace(LINEAR, weight=grid(spec, [1.0], [0]), weight_codes=codes)

    assert narrow.largest_pair == 14
    with pytest.raises(RecipeError, match=r"net\.linear: two neighbouring weights add up to 144, their grid says 128"):
        replace(narrow, pts_exponent=exponent)


def test_exponents_that_do_not_fit_are_refused_by_name_on_a_grid_with_pairs() -> None:
    with pytest.raises(RecipeError, match=r"net\.conv2d: PTS needs an int8 exponent per input channel"):
        paired(CONV, [[1, 2, 3, 4]], pts_exponent=np.int8([0, 0, 0]))


@pytest.mark.parametrize("bits", [6, 7])
def test_narrow_inputs_saturate_nothing(bits: int) -> None:
    narrow = activation_grid(np.float32([-1, 1]), bits)

    layer = paired(CONV, [[127, 127, 127, 127]], input=narrow)

    assert layer.largest_pair == 0


def test_a_depthwise_convolution_has_no_pairs() -> None:
    depthwise = paired(CONV, [[127]] * 3, groups=3)

    assert depthwise.neighbours is None
    assert depthwise.largest_pair == 0


def test_stacked_inputs_leave_odd_channels_no_neighbour() -> None:
    rows = [[1, 127, 64]]  # safe on one code; the 127 is beside 64 on two
    assert paired(CONV, rows).largest_pair == 128

    with pytest.raises(RecipeError, match="add up to 254"):
        paired(CONV, rows, input=activation_grid(np.float32([-1, 1]), codes=2))


@pytest.mark.parametrize("end", ["input", "output"])
@pytest.mark.parametrize(
    "params",
    [grid(QuantSpec(8), 1.0, -3), grid(QuantSpec(8, signed=False, axis=0), [1.0] * 3, [0] * 3)],
    ids=["signed", "per channel"],
)
def test_activations_are_unsigned_with_one_scale(params: QParams, end: str) -> None:
    with pytest.raises(RecipeError, match=r"net\.conv2d"):
        replace(CONV, **{end: params})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"les_scale": np.float32([1, 2])}, "LES needs a float32 factor per input channel"),
        ({"les_scale": np.float64([1, 2, 3])}, "LES needs a float32 factor per input channel"),
        ({"les_scale": np.float32([1, 0, 3])}, "every LES factor must be positive and finite"),
        ({"les_scale": np.float32([1, -1, 3])}, "every LES factor must be positive and finite"),
        ({"les_scale": np.float32([1, np.inf, 3])}, "every LES factor must be positive and finite"),
        ({"pts_exponent": np.int8([0, 0, 0, 0])}, "PTS needs an int8 exponent per input channel"),
        ({"pts_exponent": np.int32([0, 0, 0])}, "PTS needs an int8 exponent per input channel"),
        ({"pts_exponent": np.int8([0, 1, 0])}, r"PTS exponents must be in -4\.\.0"),
        ({"pts_exponent": np.int8([0, -5, 0])}, r"PTS exponents must be in -4\.\.0"),
        ({"groups": 2, "les_scale": np.float32([1, 2, 3])}, "LES needs a float32 factor per input channel"),
    ],
)
def test_scaling_that_does_not_fit_its_layer_cannot_exist(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=rf"net\.conv2d: {message}"):
        replace(CONV, **changes)


def test_a_grouped_layer_has_a_factor_for_each_channel_of_all_groups() -> None:
    tau, exponent = np.float32([0.5, 1, 2, 4, 8, 16]), np.int8([0, 0, -1, 0, 0, -2])

    layer = replace(CONV, groups=2, les_scale=tau, pts_exponent=exponent)

    assert layer.input_factor is not None
    np.testing.assert_array_equal(layer.input_factor, [2, 1, 1, 0.25, 0.125, 0.25])  # 1 / (tau 2^d)
    assert layer.input_factor.dtype == np.float32
    assert CONV.input_factor is None


@pytest.mark.parametrize(
    ("scale", "zero_point"),
    [
        (np.float32([1, 2]), np.int32([0])),
        (np.float32(1), np.int32(0)),
        (np.float32([1, 0]), np.int32([0, 0])),
        (np.float32([1, np.nan]), np.int32([0, 0])),
        (np.float64([1, 2]), np.int32([0, 0])),
        (np.float32([1, 2]), np.int64([0, 0])),
    ],
)
def test_a_finite_set_has_one_usable_grid_per_timestep(scale: np.ndarray, zero_point: np.ndarray) -> None:
    with pytest.raises(RecipeError):
        TimestepGrids(np.asarray(scale), np.asarray(zero_point))


def test_a_table_is_float32() -> None:
    with pytest.raises(RecipeError, match=r"net\.emb"):
        TemporalTable("emb", "net.emb", np.zeros((3, 4)), True)


@pytest.mark.parametrize("value", [-9, 8])
def test_one_code_outside_four_bits_is_enough(value: int) -> None:
    codes = LINEAR.weight_codes.copy()
    codes[2, 1] = value

    with pytest.raises(RecipeError, match="weight codes leave the 4-bit grid"):
        replace(LINEAR, weight_codes=codes)


def table(rows: np.ndarray) -> TemporalTable:
    return TemporalTable("emb", "net.emb", rows.astype(np.float32), True)


@pytest.mark.parametrize("held", [1, 4])
def test_a_table_may_have_several_rows_for_each_sample(held: int) -> None:
    rows = np.arange(3 * held * 2, dtype=np.float32).reshape(3, held, 2)

    frames = replace(table(rows), rows_per_sample=4)

    assert frames.unfolded.shape == (3, 4, 2)
    assert np.array_equal(frames.unfolded[:, :held], rows)
    with pytest.raises(RecipeError, match="3 rows per sample, but a table of shape"):
        replace(table(rows[:, :2] if held > 1 else rows[:, 0, 0]), rows_per_sample=3)


def test_a_table_has_one_row_per_timestep() -> None:
    schedule = TimestepSet((2, 1, 0))

    assert TibRecipe(schedule, (table(normal(0, 3, 4)),)).nbytes == 3 * 4 * 4
    with pytest.raises(RecipeError, match=r"net\.emb: 2 rows for 3 timesteps"):
        TibRecipe(schedule, (table(normal(0, 2, 4)),))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_table_is_finite(value: float) -> None:
    rows = normal(0, 3, 4)
    rows[1, 2] = value

    with pytest.raises(RecipeError, match=r"net\.emb: the temporal table holds NaN or infinity"):
        TibRecipe(TimestepSet((2, 1, 0)), (table(rows),))


def test_shares_are_weighted_by_work() -> None:
    recipe = recipe_with([replace(CONV, macs=600), replace(LINEAR, macs=100)])
    recipe = replace(recipe, macs=1000, kept_float=(FloatLayer("out", "net.out", 300, "first reason"),))

    assert recipe.integer_share == 0.7


def test_a_float_recipe_has_no_integer_share() -> None:
    recipe = recipe_with()

    assert recipe.integer_share == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"left": grid(QuantSpec(8, signed=False), 1.0, 3)}, "zero points of a product's factors must be 0"),
        ({"right": grid(QuantSpec(8), 1.0, -1)}, "zero points of a product's factors must be 0"),
        ({"right": softmax_grid()}, "the second factor of a product needs a signed grid"),
        ({"left": grid(QuantSpec(8, axis=0), [1.0] * 2, [0] * 2)}, "needs one scale and one code"),
        ({"left": grid(QuantSpec(8, signed=False, codes=2), 1.0, 0)}, "needs one scale and one code"),
    ],
)
def test_invalid_products_cannot_exist(changes: dict[str, QParams], message: str) -> None:
    with pytest.raises(RecipeError, match=rf"attn\[pv\]: .*{message}"):
        replace(product_recipes()[1], **changes)


def test_products_count_among_the_integers() -> None:
    layer = replace(LINEAR, macs=300)
    recipe = replace(recipe_with([layer]), macs=1000)

    assert recipe.integer_share == 0.3
    assert replace(recipe, products=product_recipes()).integer_share == 0.4
