"""The receipt: for each layer, the precision that was requested and the one that really runs.

A QDQ graph that loads is not one that runs in integers: where a pattern is missed, an engine dequantizes
and computes in floating point without a word. Each engine's own account is read by a file of its own
(``realized.py`` dispatches); what they all fill in is here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tfmq_export.bundle.manifest import LayerInfo
from tfmq_export.errors import PrecisionError


@dataclass(frozen=True, slots=True)
class LayerReceipt:
    """One layer: asked against realized.

    Attributes:
        realized: Kinds of operation that compute it, in the engine's own words; empty where none was found.
        reason: Why it is not what was asked; empty where it is.
        kernel_sqnr: Of an integer kernel that computes something else on this host than floating point does, dB.
    """

    layer: LayerInfo
    realized: tuple[str, ...]
    reason: str
    kernel_sqnr: float | None = None

    @property
    def asked(self) -> str:
        """Such as "W4A8"; "float" where nothing is quantized."""
        weight = f"W{self.layer.weight_bits}" if self.layer.weight_bits else ""
        return weight + (f"A{self.layer.activation_bits}" if self.layer.activation_bits else "") or "float"

    @property
    def integer(self) -> bool:
        """Whether it was asked to run in integers and does."""
        return bool(self.layer.activation_bits and self.realized) and not self.reason

    @property
    def emulated(self) -> str:
        """Widths below 8 bits that 8-bit kernels carry; empty where there are none."""
        widths = {"weights": self.layer.weight_bits, "activations": self.layer.activation_bits}
        narrow = [f"{bits}-bit {what}" for what, bits in widths.items() if 0 < bits < 8]
        return f"{' and '.join(narrow)} on 8-bit kernels" if self.integer and narrow else ""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a runtime made of a graph.

    Attributes:
        strays: Operations of no layer asked for that compute on dequantized numbers, with the reason.
        macs: Multiply-accumulates of the whole model for one sample.
    """

    rows: tuple[LayerReceipt, ...]
    strays: tuple[tuple[str, str], ...]
    macs: int

    @classmethod
    def in_float(cls, requested: Sequence[LayerInfo], reason: str, macs: int) -> "Receipt":
        """Of an engine that runs every layer in floating point, for one reason."""
        rows = [LayerReceipt(layer, ("float",), reason if layer.activation_bits else "") for layer in requested]
        return cls(tuple(rows), (), macs)

    @property
    def lost(self) -> tuple[LayerReceipt, ...]:
        """Layers that are not what was asked."""
        return tuple(row for row in self.rows if row.reason)

    @property
    def integer_share(self) -> float:
        """Share of the model's multiply-accumulates that run in integers."""
        return sum(row.layer.macs for row in self.rows if row.integer) / self.macs if self.macs else 0.0

    def counts(self, kind: str) -> tuple[int, int]:
        """Layers of a kind ("conv", "linear", "attention") that run in integers, and those asked to."""
        rows = [row for row in self.rows if row.layer.kind == kind and row.layer.activation_bits]
        return sum(row.integer for row in rows), len(rows)

    def raise_if_lost(self) -> None:
        """Raise PrecisionError naming the first losses."""
        losses = [(row.layer.path, row.reason) for row in self.lost] + list(self.strays)
        if losses:
            shown = "; ".join(f"{where}: {reason}" for where, reason in losses[:3])
            more = f"; and {len(losses) - 3} more" if len(losses) > 3 else ""
            advice = "keep them in float, or see the graph of each pass with --dump-dir"
            if any(row.kernel_sqnr is not None for row in self.lost):
                advice = "compile for --cpus any, which is the default, or serve it where the kernels are right"
            raise PrecisionError(
                f"{len(losses)} of {len(self.rows)} layers are not what was asked: {shown}{more}; {advice}"
            )

    def to_json(self) -> dict[str, object]:
        """Plain data for ``json.dumps``."""
        return {
            "integer_share": self.integer_share,
            "convs": self.counts("conv"),
            "linears": self.counts("linear"),
            "attention_products": self.counts("attention"),
            "layers": [
                {
                    "name": row.layer.name,
                    "path": row.layer.path,
                    "asked": row.asked,
                    "realized": list(row.realized),
                    "emulated": row.emulated,
                    "lost": row.reason,
                }
                for row in self.rows
            ],
            "strays": [{"name": name, "lost": reason} for name, reason in self.strays],
        }


def total_macs(requested: Sequence[LayerInfo], macs: int | None) -> int:
    """Multiply-accumulates of the whole model: as told, else the sum over the layers asked for."""
    return sum(layer.macs for layer in requested) if macs is None else macs
