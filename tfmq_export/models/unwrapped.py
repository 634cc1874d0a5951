"""The model inside of what people wrap around one to train it or to run it faster."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from tfmq_export.errors import LoadError

QUANTIZED = ("torch.ao.nn", "torch.ao.quantization", "torchao.", "bitsandbytes.")
"""Where the layers and the weights of quantized models come from."""


def unwrapped(module: nn.Module, where: str) -> nn.Module:
    """What ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` hold; any other module as it is.

    Raises:
        LoadError: there is no full-precision model of Python code inside.
    """
    while True:
        inside = module.__dict__.get("_modules", {}).get("_orig_mod")
        if inside is not None:
            module = inside
        elif isinstance(module, DataParallel | DistributedDataParallel):
            module = module.module
        else:
            break
    if isinstance(module, torch.jit.ScriptModule):
        raise LoadError(f"{where}: TorchScript has no code to capture; give the nn.Module that it was made from")
    for path, part in module.named_modules():
        held = (type(value) for value in part._parameters.values() if value is not None)
        found = next((kind for kind in (type(part), *held) if kind.__module__.startswith(QUANTIZED)), None)
        if found is not None:
            raise LoadError(
                f"{where}: {path or 'the module'} is quantized already ({found.__module__}.{found.__qualname__}); give "
                "the model in full precision"
            )
    return module


@contextmanager
def not_compiled() -> Iterator[None]:
    """Run what ``torch.compile`` made as the Python that it was made from, so that calls can be seen."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
