"""Names of nodes and values: spelled once, and read back as they were given."""

import ast
from pathlib import Path

import pytest

import tfmq_export
from tfmq_export.recipe import names

ROOT = Path(tfmq_export.__file__).parent
LAYERS = ("conv2d", "conv2d_1", "conv2d_2_part0", "linear")
OWN_FORMATS = {"recipe/io.py": {".weight_codes"}}
"""Keys of a file of arrays, which is no graph."""
COMMON = {".weight", ".table", ".single"}
"""What other things end in, too."""


def test_graphs_of_every_release_have_the_same_names() -> None:
    assert names.OUTPUT == "out_sample"
    assert names.node_name("conv2d") == "node_conv2d"
    assert names.half_name("conv2d", 1) == "conv2d_part1"
    assert names.part_name("linear", 1) == "linear.part_1"
    assert names.scores_name("attention") == "attention_scores"
    assert names.scaled_name("linear") == "linear.scaled"
    assert names.weight_codes_name("linear") == "linear.weight_codes"
    assert names.weight_dequantizer_name("linear") == "linear.weight_dq"
    assert (names.ROWS, names.lookup_name("prompt")) == ("temporal.rows", "temporal.prompt")
    assert names.rows_name("silu") == "temporal.silu.table"
    assert names.gather_name("silu") == "temporal.silu.gather"
    assert names.scales_name("silu") == "temporal.silu.scale_row"
    assert names.single_name("silu") == "temporal.silu.single"
    assert names.table_name("linear") == "linear.table"


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_found_by_what_it_is_given(layer: str) -> None:
    node, part = names.node_name(layer), names.part_name(layer, 1)

    assert names.is_node_name(node)
    assert names.layer_named(node, LAYERS) == layer
    assert names.layer_named(names.node_name(part), LAYERS) == layer
    for weight in (names.weight_codes_name(layer), names.weight_codes_name(part), names.weight_dequantizer_name(layer)):
        assert names.layer_of_weight(weight, LAYERS) == layer
    assert names.layer_of_weight(f"{layer}.bias_codes", LAYERS) is None


def test_integers_of_a_weight_are_known_however_often_they_are_stored() -> None:
    codes = names.weight_codes_name("conv2d")

    assert all(map(names.is_weight_codes, (codes, f"{codes}{names.REPEATED}", f"{codes}{names.STACKED}")))
    assert not names.is_weight_codes(names.weight_dequantizer_name("conv2d"))


def test_a_feature_is_found_by_what_reads_its_rows() -> None:
    assert names.feature_gathered(names.gather_name("silu.gather")) == "silu.gather"
    assert names.feature_gathered(names.scales_name("silu")) is None
    assert names.feature_gathered("silu.gather") is None
    assert names.serves_batch(names.single_name("silu"))
    assert not names.serves_batch(names.gather_name("silu"))
    assert all(map(names.is_lookup, (names.ROWS, names.gather_name("silu"), names.single_name("silu"))))
    assert not names.is_lookup(names.node_name("temporal"))


def test_nobody_else_spells_what_names_spells() -> None:
    spelled = {piece for piece in pieces(ROOT / "recipe" / "names.py") if piece != piece.strip("._")}
    own = spelled - COMMON | {names.OUTPUT}
    rooms = [path for path in ROOT.iterdir() if path.is_dir()]  # two of them are links, which rglob does not enter
    others = [path for room in rooms for path in room.rglob("*.py") if path.name != "names.py"]

    assert {"node_", "temporal.", ".part_", ".rescale", "_scores"} <= own
    for path in others:
        place = path.relative_to(ROOT).as_posix()
        assert pieces(path) & own <= OWN_FORMATS.get(place, set()), place


def pieces(path: Path) -> set[str]:
    """Strings of a module, and what stands between the braces of its f-strings; no docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docs]
    return {node.value for node in texts if isinstance(node.value, str)}
