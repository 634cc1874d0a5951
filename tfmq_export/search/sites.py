"""What every layer may take, with what each choice costs: measured errors, counted bytes, work in floating point."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tfmq_export.ptq.walk.widths import FLOAT, Widths
from tfmq_export.recipe.recipe import LayerRecipe, QuantRecipe
from tfmq_export.report.numbers import size as in_words
from tfmq_export.search.choices import Choice, Picks, Site, total
from tfmq_export.target import Target

IN_FLOAT = "--auto keeps it in floating point: integers would add too much error, and bits would take too much room"
INTEGER_NODES, STORED_NODES = 640, 280
INTEGER_NAMES, STORED_NAMES = 42, 8
"""Bytes that the nodes and small constants of a layer take in a graph, in integers and from stored weights, and how
often they have its name in theirs."""


@dataclass(frozen=True, slots=True)
class PartErrors:
    """What one layer's parts cost the prediction, each alone.

    Attributes:
        weights: By bits.
        inputs: Of its 8-bit inputs (or as they are pinned).
        output: Of the grid that the target puts on its output; 0 where it puts none.
    """

    weights: Mapping[int, float]
    inputs: float
    output: float

    @property
    def activations(self) -> float:
        """What computing in integers costs."""
        return self.inputs + self.output


@dataclass(frozen=True, slots=True)
class LayerSite:
    """One layer and its choices.

    Attributes:
        name: The value it computes in the graph.
        path: For people.
        bits: Weights and inputs of each choice; inputs of ``FLOAT`` compute in floating point.
        choices: What each costs.
        errors: Behind them.
    """

    name: str
    path: str
    bits: tuple[tuple[int, int], ...]
    choices: tuple[Choice, ...]
    errors: PartErrors

    def in_integers(self) -> "LayerSite":
        """Only the choices that compute in integers, where there are any."""
        kept = [place for place, (_, inputs) in enumerate(self.bits) if inputs != FLOAT]
        if not kept:
            return self
        return replace(self, bits=tuple(self.bits[x] for x in kept), choices=tuple(self.choices[x] for x in kept))

    def narrow_larger_by(self, count: int) -> "LayerSite":
        """With so many bytes more where weights have fewer bits than they could."""
        widest = max(weights for weights, _ in self.bits)
        choices = tuple(
            choice if weights == widest else replace(choice, size=choice.size + count)
            for (weights, _), choice in zip(self.bits, self.choices, strict=True)
        )
        return replace(self, choices=choices)

    def why(self, pick: int, whole: float) -> str:
        """Why a choice was taken, for people.

        Args:
            whole: Error of all layers together.
        """
        weights, inputs = self.bits[pick]
        taken, said = self.choices[pick], []
        for other, (its_weights, its_inputs) in enumerate(self.bits):
            if its_inputs == inputs and its_weights != weights:
                step, saved = self.choices[other].error - taken.error, abs(self.choices[other].size - taken.size)
                share = f"{100 * abs(step) / whole:.2g} %" if whole else "nothing"
                said.append(
                    f"{its_weights} would add {share} to the error and save {in_words(saved)}"
                    if its_weights < weights
                    else f"{its_weights} would take {share} from the error and {in_words(saved)} more"
                )
        text = f"auto: {weights} bits" + (f", {said[0]}" if said else "")
        if inputs == FLOAT:
            added = 100 * self.errors.activations / whole if whole else 0.0
            text += f"; in floating point, since integers would add {added:.2g} % to the error"
        return text


def layer_sites(
    wide: QuantRecipe,
    narrow: QuantRecipe,
    errors: Mapping[str, PartErrors],
    pins: Mapping[str, Widths],
    target: Target,
) -> tuple[LayerSite, ...]:
    """The choices of every layer that a recipe quantizes.

    Args:
        wide: With 8-bit weights.
        narrow: With 4-bit weights, where they may be.
        errors: By layer.
        pins: A pinned input leaves no choice of floating point.
    """
    narrower = {layer.name: layer for layer in narrow.layers}
    found = []
    for layer in wide.layers:
        pin, other, cost = pins.get(layer.name), narrower[layer.name], layer.macs / max(1, wide.macs)
        may_store = target.stored_weights and (pin is None or pin.inputs is None)
        bits, choices, error = [], [], errors[layer.name]
        for each in (layer,) if other.weight.spec.bits == layer.weight.spec.bits else (layer, other):
            width = each.weight.spec.bits
            bits.append((width, each.input.spec.bits))
            choices.append(Choice(error.weights[width] + error.activations, integer_bytes(each, target)))
            if may_store:
                bits.append((width, FLOAT))
                choices.append(Choice(error.weights[width], stored_bytes(each), cost))
        found.append(LayerSite(layer.name, layer.path, tuple(bits), tuple(choices), error))
    return tuple(found)


def integer_bytes(layer: LayerRecipe, target: Target) -> int:
    """What a layer that runs in integers takes in the graph: codes, scales and nodes."""
    outputs, copies = len(layer.weight_codes), 1 if layer.output is None else layer.output.spec.codes
    packed = target.packed_weights and layer.weight.spec.bits <= 4
    codes = math.ceil(layer.weight_codes.size * (0.5 if packed else 1)) * layer.input.spec.codes * copies
    nodes = INTEGER_NODES + INTEGER_NAMES * len(layer.name)
    factors = 4 * layer.weight_codes.shape[1] * layer.groups if layer.les_scale is not None else 0
    return codes + (13 if target.integer_bias else 5) * outputs * copies + factors + nodes


def stored_bytes(layer: LayerRecipe) -> int:
    """What the same layer takes where it computes in floating point from stored weights."""
    outputs, packed = len(layer.weight_codes), layer.weight.spec.bits <= 4
    nodes = STORED_NODES + STORED_NAMES * len(layer.name)
    return math.ceil(layer.weight_codes.size * (0.5 if packed else 1)) + 8 * outputs + nodes


def widths_of(sites: Sequence[LayerSite], picks: Picks, pins: Mapping[str, Widths]) -> dict[str, Widths]:
    """The bits of every layer: as chosen, and why; what is pinned stays pinned."""
    whole = total([site.choices for site in sites], picks).error
    found = dict(pins)
    for site, pick in zip(sites, picks, strict=True):
        weights, inputs = site.bits[pick]
        pin = pins.get(site.name)
        why = site.why(pick, whole) if pin is None else f"{pin.why}; {site.why(pick, whole)}"
        kept = (pin.in_float if pin is not None else IN_FLOAT) if inputs == FLOAT else ""
        found[site.name] = Widths(weights, inputs, why, kept)
    return found


def choices_of(sites: Iterable[LayerSite]) -> list[Site]:
    """As the solver takes them."""
    return [site.choices for site in sites]
