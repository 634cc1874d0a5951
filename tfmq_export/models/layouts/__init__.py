"""What stands on disk: each layout of a checkpoint that people have, told by names and headers, and its reader."""
