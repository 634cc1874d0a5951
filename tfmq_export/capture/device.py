"""Where quantization computes: the CPU, or a GPU where there is one."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tfmq_export.errors import ConfigError

CPU = torch.device("cpu")


def find_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is a GPU where PyTorch sees one.

    Raises:
        ConfigError: a GPU was asked for by name, and PyTorch sees none.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        built = "sees no GPU" if torch.version.cuda else "was built without CUDA"
        raise ConfigError(f"device cuda: this PyTorch ({torch.__version__}) {built}; leave --device out to use the CPU")
    return torch.device("cuda:0") if there and name != "cpu" else CPU


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes."""
    held = next(module.parameters(), None)
    return CPU if held is None else held.device


def module_on(module: nn.Module, device: torch.device) -> nn.Module:
    """A module on a device: itself where it is there already, else a copy."""
    return module if device_of(module) == device else copy.deepcopy(module).to(device)


def sent(rows: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU on a device, without waiting for what that still computes."""
    return rows if device.type == "cpu" else rows.pin_memory().to(device, non_blocking=True)


def has_room(device: torch.device, size: int) -> bool:
    """Whether so many bytes are no more than half of the memory a GPU has free."""
    return device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] // 2


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """The same results in every run, and matrix products in TF32 on a GPU.

    TF32 keeps 10 bits behind the point where bfloat16 keeps 7: the grids that are learned on have 8.
    """
    if device.type != "cuda":
        yield
        return
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
