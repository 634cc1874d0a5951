"""What this process holds in memory, as Linux tells it."""

import re
from pathlib import Path


def held_bytes(kind: str) -> int:
    """Bytes.

    Args:
        kind: "RssFile", pages of files; "RssAnon", its own.
    """
    (kilobytes,) = re.findall(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(kilobytes) << 10
