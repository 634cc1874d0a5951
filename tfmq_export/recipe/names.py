"""Names of nodes and values in a graph that somebody looks for, and what they say.

A name is all that says which layer a node computes once a graph is a file, and most of what says it once an engine
has rewritten that file. Here is every name that is read anywhere else than where it is given; a name that nobody looks
for is spelled where it is given.

Here in the recipe's room, because all sides of the waist need them and may not import each other: capture names what
recipes speak of, passes name nodes after that, runtimes and proofs find them again. Imports nothing but ``re``.
"""

import re
from collections.abc import Collection

OUTPUT = "out_sample"
"""The one output of a graph, as diffusers calls it."""

# Layers and products. The exporter names values after the captured graph, and so do recipes.

_NODE = "node_"
_HALF, _PART = "_part", ".part_"
_SCORES = "_scores"
_WEIGHT, _CODES = ".weight", ".weight_codes"
_APPENDED = re.compile(r"(_token_\d+|_nchwc|[./][^./]*)$")
"""What graph optimizers (ONNX Runtime, TensorRT) and our passes append to the name of a node."""


def node_name(value: str) -> str:
    """The node that computes a value; for a layer, the one that multiplies."""
    return f"{_NODE}{value}"


def is_node_name(name: str) -> bool:
    """Whether a node is called after what it computes."""
    return name.startswith(_NODE)


def half_name(layer: str, index: int) -> str:
    """What a layer on a concatenation computes of one of the values that are concatenated (``SkipSplit``)."""
    return f"{layer}{_HALF}{index}"


def part_name(layer: str, index: int) -> str:
    """Some output channels of a layer that is computed in parts (``SplitResults``)."""
    return f"{layer}{_PART}{index}"


def scores_name(attention: str) -> str:
    """``q k^T`` of an attention that was one node, in the captured graph and in ONNX."""
    return f"{attention}{_SCORES}"


def scaled_name(layer: str) -> str:
    """The result of a layer that took the next one's factor (``FoldRescales``): another number than the recipe's."""
    return f"{layer}.scaled"


def weight_codes_name(layer: str) -> str:
    """The stored integers of a layer's weight."""
    return f"{layer}{_CODES}"


def weight_dequantizer_name(layer: str) -> str:
    """The DequantizeLinear of a layer's weight."""
    return f"{layer}.weight_dq"


REPEATED, STACKED = ".repeated", ".stacked"
"""Behind the name of stored integers that are there once per code of the input, or of the output."""


def is_weight_codes(value: str) -> bool:
    """Whether a constant holds the integers of a weight."""
    return value.endswith((_CODES, REPEATED, STACKED))


def layer_named(node: str, layers: Collection[str]) -> str | None:
    """The layer a node's name speaks of: the inverse of ``node_name``, whatever is appended to it."""
    stem: str | None = node.removeprefix(_NODE)
    while stem:
        if stem in layers:
            return stem
        shorter = _APPENDED.sub("", stem)
        stem = shorter if shorter != stem else None
    return None


def layer_of_weight(value: str, layers: Collection[str]) -> str | None:
    """The layer a weight belongs to, by its name or that of anything its integers become."""
    stem, found, _ = value.rpartition(_WEIGHT)
    return layer_named(stem, layers) if found else None


# What passes put around a layer, behind the name of the layer or of the value it reads.

RESCALE = ".rescale"
"""The Mul of ``RescaleInputs``."""
RAISED = ".raised"
"""A DequantizeLinear without the zero point, and its result (``FoldZeroPoints``)."""
OFFSET = ".offset_add"
"""The Add behind a product without a bias, which takes the zero point of its input."""
INPUT_PAD, INPUT_COPY, INPUT_OFFSET = ".input.pad", ".input.copy", ".input.offset"
"""What pads, copies and moves a layer's input in front of its quantizer (``OffsetInputs``)."""
OUTPUT_SUM = ".output.sum"
"""What adds up a layer's stacked codes (``StackOutputCodes``)."""

# The timestep: all nodes that read it, or rows of it, are called ``temporal.<something>``.

_LOOKUP = "temporal."
_GATHER, _SCALES, _SINGLE, _TABLE = ".gather", ".scale_row", ".single", ".table"

ROWS = f"{_LOOKUP}rows"
"""The row of each timestep in every table."""


def lookup_name(what: str) -> str:
    """A node or a value on the way from the timestep to a row, or what those of a feature begin with."""
    return f"{_LOOKUP}{what}"


def is_lookup(name: str) -> bool:
    """Whether a node or a value is on the way from the timestep to a row."""
    return name.startswith(_LOOKUP)


def rows_name(feature: str) -> str:
    """The rows of a feature, a constant."""
    return f"{lookup_name(feature)}{_TABLE}"


def gather_name(feature: str) -> str:
    """What takes the row of a feature."""
    return f"{lookup_name(feature)}{_GATHER}"


def scales_name(feature: str) -> str:
    """What takes the scale of a row, where rows are stored as integers (``NarrowTables``)."""
    return f"{lookup_name(feature)}{_SCALES}"


def single_name(feature: str) -> str:
    """What gives the row of a feature to the whole batch."""
    return f"{lookup_name(feature)}{_SINGLE}"


def feature_gathered(node: str) -> str | None:
    """The feature whose row a node takes: the inverse of ``gather_name``."""
    return node.removeprefix(_LOOKUP).removesuffix(_GATHER) if is_lookup(node) and node.endswith(_GATHER) else None


def serves_batch(node: str) -> bool:
    """Whether a node gives a row to the whole batch, so that there is one timestep per call."""
    return is_lookup(node) and node.endswith(_SINGLE)


def table_name(value: str) -> str:
    """What a prologue passes of a value of prompt and timestep: its rows for the whole schedule."""
    return f"{value}{_TABLE}"
