"""Why a module cannot be captured: the first cause, where it is, and advice that fits it."""

import re
from collections.abc import Iterator

from torch.export import ExportedProgram

from tfmq_export.capture.place import place_of, raised_at
from tfmq_export.errors import ExportError, first_line

_NODE = re.compile(r"translating node %(\w+)")
_OPERATOR = re.compile(r"OpOverload\(op='([\w.]+)', overload='(\w+)'\)")
_STYLE = re.compile(r"\x1b\[\d+m")

DATA_DEPENDENT = "replace data-dependent Python control flow in forward() by tensor operations"
COMPLEX = "write complex numbers as real tensors, with the cosine and the sine"
UNSUPPORTED = "compute it with operators that ONNX has"
SYMBOL = "a number that data or sizes decide cannot be a key or a count in Python; keep it in tensors"
OTHER = "forward() has to run on tensors without data, of any batch size"


def refusal(source: str, error: BaseException, exported: ExportedProgram | None) -> ExportError:
    """What to raise in place of an error of ``torch.export`` or of the ONNX exporter.

    Args:
        source: The model's name.
        exported: The captured program, where it is its translation that failed.
    """
    chain = list(_causes(error))
    cause, text = chain[-1], " ".join(str(each) for each in chain)
    operator = _OPERATOR.search(text)
    if "complex" in str(cause):
        advice = COMPLEX
    elif any("DataDependent" in type(each).__name__ or "data-dependent" in str(each).lower() for each in chain):
        advice = DATA_DEPENDENT
    elif "SymInt" in str(cause):
        advice = SYMBOL
    elif operator is not None and exported is not None:
        advice = UNSUPPORTED
    else:
        advice = OTHER
    what = f"ONNX has no form for {'.'.join(operator.groups())}" if advice is UNSUPPORTED and operator else _line(cause)
    place = _place(text, chain, exported)
    return ExportError(
        f"{source}: torch.export cannot capture this module: {what}{f' ({place})' if place else ''}; {advice}"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from, the first cause last."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        yield found
        seen.add(id(found))
        found = found.__cause__


def _line(error: BaseException) -> str:
    line = _STYLE.sub("", first_line(error))
    name = type(error).__name__
    return line if name in line or isinstance(error, RuntimeError) else f"{name}: {line}"


def _place(text: str, chain: list[BaseException], exported: ExportedProgram | None) -> str:
    named = _NODE.search(text)
    if named is not None and exported is not None:
        nodes = [node for node in exported.graph.nodes if node.name == named[1]]
        nodes += [node for node in exported.graph.nodes if str(node.target).rpartition(".")[0].endswith(named[1])]
        if nodes:  # the exporter decomposes further, and then names nodes after their operator
            return place_of(nodes[0])
    return next((place for place in map(raised_at, reversed(chain)) if place), "")
