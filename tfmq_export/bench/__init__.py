"""How fast and how exact a bundle is, and against what: the command tfmq-bench.

candidates    what to run: bundles, and the baselines a user would pick instead
workshop      makes what they need: graphs and inputs
float_model   the model they came from, in PyTorch: calls to calibrate on and to judge on
worker        one candidate in a process of its own: load time, memory, accuracy, one turn at a time
run           lets all workers take turns
report, plot  what was found
"""
