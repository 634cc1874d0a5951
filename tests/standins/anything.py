"""Values of any kind for hypothesis, and what reading them may end in."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tfmq_export.errors import TfmqError

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
"""What JSON can say, and numbers that it cannot."""
QUICKLY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def only_ours(read: Callable[[Path], object], path: Path) -> None:
    """Read a file that may be damaged: it opens, or is refused by an error of ours."""
    with contextlib.suppress(TfmqError):
        read(path)
