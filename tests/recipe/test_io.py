import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets.attention_graphs import product_recipes
from nets.onnx_graphs import normal
from nets.toy_nets import conv_net, skip_net, token_net
from nets.toy_recipes import activation_grid, layer_recipe, recipe_for, recipe_with, rounded_weight

from tfmq_export.errors import RecipeError
from tfmq_export.recipe.correction import Correction
from tfmq_export.recipe.grid import QParams
from tfmq_export.recipe.io import load_recipe, save_recipe
from tfmq_export.recipe.recipe import FloatLayer, LayerRecipe, QuantRecipe, TemporalTable, TimestepGrids
from tfmq_export.recipe.stored_layer import StoredLayer
from tfmq_export.recipe.timesteps import TimestepSet


def same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()


def same_array(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    if first is None or second is None:
        return first is second
    return same_bits(first, second)


def same_grid(first: QParams | None, second: QParams | None) -> bool:
    if first is None or second is None:
        return first is second
    arrays = ((first.scale, second.scale), (first.zero_point, second.zero_point))
    return first.spec == second.spec and all(same_bits(*pair) for pair in arrays)


def assert_same_layer(first: LayerRecipe, second: LayerRecipe) -> None:
    assert (first.name, first.path, first.kind, first.macs) == (second.name, second.path, second.kind, second.macs)
    assert same_bits(first.weight_codes, second.weight_codes)
    assert same_grid(first.weight, second.weight)
    assert same_grid(first.input, second.input)
    assert same_grid(first.output, second.output)
    assert first.groups == second.groups
    for field in ("les_scale", "pts_exponent"):
        assert same_array(getattr(first, field), getattr(second, field))
    for role in ("input_by_timestep", "output_by_timestep"):
        ours, theirs = getattr(first, role), getattr(second, role)
        assert (ours is None) == (theirs is None)
        for field in ("scale", "zero_point"):
            assert same_array(getattr(ours, field, None), getattr(theirs, field, None))


def assert_same(first: QuantRecipe, second: QuantRecipe) -> None:
    for field in ("fingerprint", "preset", "kept_float", "macs", "provenance", "splits"):
        assert getattr(first, field) == getattr(second, field)
    for ours, theirs in zip(first.layers, second.layers, strict=True):
        assert_same_layer(ours, theirs)
    for one, other in zip(first.stored, second.stored, strict=True):
        said = [(x.name, x.path, x.kind, x.macs, x.reason, x.chosen) for x in (one, other)]
        assert said[0] == said[1]
        assert same_grid(one.weight, other.weight)
        assert same_bits(one.weight_codes, other.weight_codes)
    for one, other in zip(first.products, second.products, strict=True):
        assert (one.name, one.path, one.macs) == (other.name, other.path, other.macs)
        assert same_grid(one.left, other.left)
        assert same_grid(one.right, other.right)
    assert (first.tib.timesteps, first.tib.source) == (second.tib.timesteps, second.tib.source)
    for table, other in zip(first.tib.tables, second.tib.tables, strict=True):
        assert (table.name, table.path, table.per_sample) == (other.name, other.path, other.per_sample)
        assert table.rows_per_sample == other.rows_per_sample
        assert same_bits(table.rows, other.rows)


def stored_layer() -> StoredLayer:
    grid, codes = rounded_weight(normal(3, 4, 2, 3, 3), 4)
    return StoredLayer("conv2d_9", "net.conv2d_9", "conv", 5, grid, codes, "pinned by *", "auto: 4 bits")


@pytest.mark.parametrize("widths", [(8, 8), (4, 6)])
@pytest.mark.parametrize("make", [conv_net, token_net])
def test_a_recipe_survives_saving_to_the_bit(tmp_path: Path, make: Callable, widths: tuple[int, int]) -> None:
    recipe = replace(
        recipe_for(make(), *widths),
        kept_float=(FloatLayer("conv_out", "net.conv_out", 7, "few channels"),),
        products=product_recipes(),
        stored=(stored_layer(),),
        provenance={"model": "mod\u00e8le.pt", "seed": "0"},
    )

    save_recipe(recipe, tmp_path)

    assert_same(load_recipe(tmp_path), recipe)


def test_everything_scaling_decided_survives_saving_to_the_bit(tmp_path: Path) -> None:
    recipe = recipe_for(skip_net(), 4, 8)
    grids = TimestepGrids(np.float32([0.1, 0.2, 0.3]), np.int32([0, 7, 255]))
    first, second, third, fourth = recipe.layers
    layers = (
        replace(first, les_scale=np.float32([0.1, 1 / 3, 7]), input_by_timestep=grids, output_by_timestep=grids),
        replace(second, pts_exponent=np.int8([0, -1, -2, -3, 0, 0])),
        replace(third, les_scale=np.float32([1, 2, 3]), pts_exponent=np.int8([-4, 0, 0])),
        fourth,
    )
    recipe = replace(recipe, layers=layers, tib=replace(recipe.tib, source="select"))
    assert recipe.splits
    assert fourth.output is not None
    assert fourth.output.spec.codes == 4

    save_recipe(recipe, tmp_path)

    assert_same(load_recipe(tmp_path), recipe)


def test_a_correction_survives_saving_to_the_bit(tmp_path: Path) -> None:
    recipe = recipe_for(conv_net())
    correction = Correction(normal(3, len(recipe.tib.timesteps), 3, 5), frozenset({"conv"}))
    recipe = replace(recipe, correction=correction)

    save_recipe(recipe, tmp_path)

    loaded = load_recipe(tmp_path).correction
    assert loaded is not None
    assert same_bits(loaded.rows, correction.rows)
    assert loaded.outputs == correction.outputs


def test_a_recipe_from_before_corrections_has_none(tmp_path: Path) -> None:
    save_recipe(recipe_for(conv_net()), tmp_path)
    document = json.loads((tmp_path / "recipe.json").read_text("utf-8"))
    del document["correction"]
    (tmp_path / "recipe.json").write_text(json.dumps(document), "utf-8")

    assert load_recipe(tmp_path).correction is None


def test_a_correction_for_another_schedule_is_refused(tmp_path: Path) -> None:
    recipe = recipe_for(conv_net())

    with pytest.raises(RecipeError, match=f"99 rows for {len(recipe.tib.timesteps)} timesteps"):
        replace(recipe, correction=Correction(normal(3, 99, 3, 5), frozenset()))


def test_groups_survive_saving(tmp_path: Path) -> None:
    grid = activation_grid(normal(1, 4))
    layer = replace(layer_recipe("conv2d", "conv", normal(0, 4, 2, 1, 1), grid, grid), groups=2)
    recipe = recipe_with([replace(layer, les_scale=np.float32([1, 2, 3, 4]))])

    save_recipe(recipe, tmp_path)

    assert_same(load_recipe(tmp_path), recipe)


def with_pairs(layer: LayerRecipe) -> LayerRecipe:
    """The layer on a grid that has pairs, which its integers keep."""
    return replace(layer, weight=replace(layer.weight, spec=replace(layer.weight.spec, pair_sum=128)))


def test_what_pairs_may_add_up_to_survives_saving(tmp_path: Path) -> None:
    recipe = recipe_for(conv_net())
    first, *others = recipe.layers
    recipe = replace(recipe, layers=(with_pairs(first), *others))

    save_recipe(recipe, tmp_path)

    assert_same(load_recipe(tmp_path), recipe)
    specs = [layer.weight.spec for layer in load_recipe(tmp_path).layers]
    assert [spec.pair_sum for spec in specs] == [128] + [None] * len(others)


def test_a_recipe_from_before_there_were_pairs_is_read(tmp_path: Path) -> None:
    recipe = recipe_for(conv_net())

    save_recipe(recipe, tmp_path)

    assert "pair_sum" not in (tmp_path / "recipe.json").read_text()
    assert_same(load_recipe(tmp_path), recipe)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5, unique=True))
def test_real_timesteps_survive_to_the_bit(tmp_path: Path, values: list[float]) -> None:
    save_recipe(recipe_with(timesteps=TimestepSet.of(np.float32(values))), tmp_path)

    assert load_recipe(tmp_path).tib.timesteps.array.tobytes() == np.float32(values).tobytes()


def test_transposed_and_strided_arrays_are_saved_as_they_read(tmp_path: Path) -> None:
    # A file holds memory row by row; these arrays do not.
    layer = layer_recipe("linear", "linear", normal(0, 3, 5).T, activation_grid(normal(1, 4)))
    layer = replace(layer, weight_codes=np.asfortranarray(layer.weight_codes))
    table = TemporalTable("emb", "net.emb", normal(2, 4, 6)[::2, ::3], True)
    frames = TemporalTable("frames", "net.frames", normal(3, 2, 1, 4), True, rows_per_sample=3)
    recipe = recipe_with([layer], [table, frames], TimestepSet((1, 0)))

    save_recipe(recipe, tmp_path)

    assert_same(load_recipe(tmp_path), recipe)


FULL_DISK = """
import resource, sys
from pathlib import Path
from tfmq_export.errors import OutputError
from tfmq_export.bundle.write import replaced_folder
from tfmq_export.recipe.io import load_recipe, save_recipe

recipe = load_recipe(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with replaced_folder(Path(sys.argv[2])) as partial:
        save_recipe(recipe, partial)
except OutputError as error:
    sys.exit(str(error))
"""


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    save_recipe(recipe_for(conv_net()), tmp_path)
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(tmp_path / "out")]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert not (tmp_path / "out").exists()
    assert "nothing was changed, free space or choose another -o" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("where", [".", "recipe.json"])
def test_a_recipe_is_found_by_folder_or_file(tmp_path: Path, where: str) -> None:
    save_recipe(recipe_with(), tmp_path)

    assert load_recipe(tmp_path / where).preset == "w8a8"


def test_a_recipe_is_found_in_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "tfmq").mkdir()
    save_recipe(recipe_with(), tmp_path / "tfmq")

    assert load_recipe(tmp_path).preset == "w8a8"


def test_others_may_read_what_was_saved(tmp_path: Path) -> None:
    save_recipe(recipe_with(), tmp_path)

    assert (tmp_path / "recipe.safetensors").stat().st_mode & 0o777 == 0o644


def truncated(folder: Path) -> None:
    path = folder / "recipe.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def emptied(folder: Path) -> None:
    (folder / "recipe.safetensors").write_bytes(b"")


def no_arrays(folder: Path) -> None:
    (folder / "recipe.safetensors").unlink()


def no_document(folder: Path) -> None:
    (folder / "recipe.json").unlink()


def half_a_document(folder: Path) -> None:
    path = folder / "recipe.json"
    path.write_text(path.read_text()[:100])


def binary_document(folder: Path) -> None:
    (folder / "recipe.json").write_bytes(b"\xff\xfe\x00")


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        document = json.loads((folder / "recipe.json").read_text())
        change(document)
        (folder / "recipe.json").write_text(json.dumps(document))

    return write


def too_large_pairs(folder: Path) -> None:
    """Integers that are free, on a grid that says they are not."""
    recipe = recipe_for(conv_net())
    first, *others = recipe.layers
    free = replace(first, weight_codes=np.full_like(first.weight_codes, 127))
    save_recipe(replace(recipe, layers=(free, *others)), folder)
    edit(lambda d: d["layers"][0]["weight"].update(pair_sum=128))(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "not a readable recipe"),
        (emptied, "not a readable recipe"),
        (half_a_document, "not a readable recipe"),
        (binary_document, "not a readable recipe"),
        (no_document, r"recipe\.json: no such file; --recipe takes a bundle or its tfmq/ folder"),
        pytest.param(no_arrays, r"recipe\.safetensors: no such file"),
        (lambda folder: (folder / "recipe.json").write_text("[]"), "not a readable recipe"),
        (edit(lambda d: d.update(schema=1)), "recipe schema 1, this version reads 4; quantize"),
        (edit(lambda d: d.pop("layers")), "not a readable recipe"),
        (edit(lambda d: d["layers"][0].update(name="conv2d_77")), "not a readable recipe"),
        (edit(lambda d: d["layers"][0].update(kind="conv3d")), "unknown kind of layer"),
        (edit(lambda d: d["layers"][0]["weight"].update(bits=2)), "weight codes leave the 2-bit grid"),
        (edit(lambda d: d["layers"][0]["weight"].update(bits=99)), r"bits must be in 2\.\.8"),
        (edit(lambda d: d["layers"][0]["weight"].update(bits="8")), "not a readable recipe"),
        (edit(lambda d: d["layers"][0]["input"].update(codes=0)), "codes must be at least 1"),
        (too_large_pairs, "two neighbouring weights add up to 254"),
        (edit(lambda d: d["layers"][0]["weight"].update(pair_sum=12)), "only weights have pairs"),
        (edit(lambda d: d["layers"][0]["weight"].update(pair_sum="128")), "only weights have pairs"),
        (edit(lambda d: d["layers"][0]["input"].update(pair_sum=255)), "only weights have pairs"),
        (edit(lambda d: d["layers"][0].pop("groups")), "not a readable recipe"),
        (edit(lambda d: d.pop("splits")), "not a readable recipe"),
        (edit(lambda d: d.pop("products")), "not a readable recipe"),
        (edit(lambda d: d["timesteps"]["values"].pop()), "4 rows for 3 timesteps"),
        (edit(lambda d: d["timesteps"].update(values=[])), "at least one timestep"),
    ],
)
def test_a_damaged_recipe_is_refused(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    save_recipe(recipe_for(conv_net()), tmp_path)
    damage(tmp_path)

    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
