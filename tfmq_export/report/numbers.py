"""Numbers for people."""

import math

POOR = 18.0
"""dB. Below it a picture differs from the model's own in more than details; a blur of 4 pixels has 16."""
PROMPT_LOST = 0.5
"""Share of guidance. Where less is kept, images follow their prompts as if guidance were half as strong, or less."""
LOST_WORDS = "LOW: the prompt hardly counts any more"
LETTERS = ("", "k", "M", "G", "T", "P")


def size(count: float) -> str:
    """Bytes."""
    if count < 1e5:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def short(value: float) -> str:
    """Three digits of any number."""
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "-∞"}.get(value, "NaN")
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        digits = 2 if value == 0 else 2 - math.floor(math.log10(abs(value)))
        text = f"{value:.{max(0, digits)}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.1e}"


def many(count: float) -> str:
    """A count, such as 9.4 M."""
    power = min(int(math.log10(count) // 3), len(LETTERS) - 1) if count >= 1 else 0
    return f"{count / 1000**power:.3g} {LETTERS[power]}".strip()


def seconds(value: float) -> str:
    """A time."""
    if value < 100:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def milliseconds(value: float) -> str:
    """A short time, given in seconds."""
    return f"{short(1e3 * value)} ms" if value < 1 else seconds(value)


def decibels(value: float) -> str:
    """A ratio in dB."""
    return f"{value:.1f} dB" if math.isfinite(value) else f"{short(value)} dB"


def exact(value: float) -> str:
    """A figure as it is compared with its bound: 0.999999 is not 1."""
    return short(value) if not 0.99 < value < 1 else f"{value:.9f}".rstrip("0").rstrip(".")
