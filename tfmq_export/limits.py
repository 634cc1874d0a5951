"""The largest numbers that may be asked for: beyond them nothing fits into a machine, or into a number's type."""

LARGEST_SEED = (1 << 32) - 1
"""That every generator takes; the seeds of single images are multiples of it, which have to fit 64 bits."""

MOST_IMAGES = 65_536
"""Drawn in one run."""

MOST_SAMPLES = 1024
"""Of a golden file, for each timestep."""

LARGEST_SIDE = 16_384
"""Of a sample, in elements."""

MOST_LAYERS = 4096
"""Of one kind in a model, as its configuration counts them; published ones have a hundred."""

MOST_STEPS = 100_000
"""Of a walk from noise to image."""

MOST_THREADS = 1024
"""Of one inference."""

LONGEST_SCHEDULE = 1_000_000
"""Timesteps a model was trained on; published ones have a thousand."""
