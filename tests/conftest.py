"""For every worker of pytest-xdist, before anything imports torch."""

import os

# Two processes with two spinning threads each slow each other five to ten times on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
