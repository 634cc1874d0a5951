"""What each backend can run, as data. Passes read it; they never ask which backend it is."""

from collections.abc import Mapping
from dataclasses import dataclass

from tfmq_export.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Target:
    """A backend's demands on the graph.

    Attributes:
        quantized_outputs: Kinds of layer that only run in integers with a QuantizeLinear on their output.
        attention: Form of attention nodes: "matmul" is portable, "mha" is com.microsoft.MultiHeadAttention.
    """

    name: str
    quantized_outputs: frozenset[str]
    attention: str


TARGETS: Mapping[str, Target] = {
    # ONNX Runtime fuses DQ -> Conv -> Q only; without the output Q the convolution silently runs in fp32.
    "ort-cpu": Target("ort-cpu", quantized_outputs=frozenset({"conv"}), attention="mha"),
}


def find_target(name: str) -> Target:
    """Look a target up.

    Raises:
        ConfigError: there is no such target.
    """
    if name not in TARGETS:
        raise ConfigError(f"unknown target {name!r}; there is {', '.join(TARGETS)}")
    return TARGETS[name]
