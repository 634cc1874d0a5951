"""Names for several bundles by where they lie."""

from collections.abc import Sequence
from pathlib import Path

from tfmq_export.errors import ConfigError


def folders_apart(roots: Sequence[Path]) -> list[str]:
    """The ends of some paths, as long as it takes to tell one from another.

    Raises:
        ConfigError: one is given twice.
    """
    parts = [root.absolute().parts for root in roots]
    for length in range(1, max(map(len, parts), default=0) + 1):
        ends = [Path(*each[-length:]).as_posix() for each in parts]
        if len(set(ends)) == len(ends):
            return ends
    raise ConfigError(f"{next(root for root in roots if parts.count(root.absolute().parts) > 1)} is given twice")
