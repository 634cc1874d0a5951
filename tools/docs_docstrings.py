"""For the API reference: sections of our docstrings stand without an empty line between them, griffe wants one."""

import re
from typing import Any

from griffe import Extension, Object

SECTION = re.compile(r"(?<=\S)\n(?=(Args|Attributes|Raises|Returns):\n)")


class SectionsApart(Extension):
    """Put an empty line in front of every section but those that have one."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for each object that was read from the source."""
        if obj.docstring is not None:
            obj.docstring.value = SECTION.sub("\n\n", obj.docstring.value)
