"""The model inside of what people wrap around one to train it or to run it faster."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from tfmq_export.errors import LoadError

QUANTIZED = (
    "torch.ao.nn.quantized.",
    "torch.ao.nn.intrinsic.quantized.",
    "torch.ao.nn.qat.",
    "torch.ao.nn.intrinsic.qat.",
    "torch.ao.quantization.fake_quantize.",
    "torchao.",
    "bitsandbytes.nn.modules.Linear",
    "bitsandbytes.nn.modules.Params4bit",
    "bitsandbytes.nn.modules.Int8Params",
)
"""How the names of layers and weights of quantized models begin."""


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
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            what = f"{path} is TorchScript, which" if path else "TorchScript"
            raise LoadError(f"{where}: {what} has no code to capture; give the nn.Module that it was made from")
        held = (type(value) for value in part._parameters.values() if value is not None)
        names = (f"{kind.__module__}.{kind.__qualname__}" for kind in (type(part), *held))
        found = next((name for name in names if name.startswith(QUANTIZED)), None)
        if found is not None:
            what = path or "the module"
            raise LoadError(f"{where}: {what} is quantized already ({found}); give the model in full precision")
    return module


@contextmanager
def not_compiled() -> Iterator[None]:
    """Run what ``torch.compile`` made as the Python that it was made from, so that calls can be seen."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
