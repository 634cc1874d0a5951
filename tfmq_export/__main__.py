"""``python -m tfmq_export``: the command ``tfmq-export``."""

from tfmq_export.cli import export_main

if __name__ == "__main__":
    export_main()
