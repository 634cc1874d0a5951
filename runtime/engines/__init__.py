"""One folder per engine, each with a ``runner`` and a ``receipt``, and the table of them."""
