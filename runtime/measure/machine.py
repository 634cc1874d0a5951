"""The machine and the packages that figures belong to."""

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path

PACKAGES = ("tfmq-export", "torch", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "nncf", "numpy")
FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")
"""What decides how fast 8-bit integers and bf16 are."""


def processor() -> str:
    """The processor's name, as Linux knows it, with the cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = next(iter(_cpuinfo("model name")), platform.processor() or platform.machine())
    return f"{cores} x {name}"


def features() -> str:
    """The instruction sets that matter here and that the processor has; empty where the system does not tell."""
    there = {word for line in _cpuinfo("flags", "Features")[:1] for word in line.split()}
    return " ".join(feature for feature in FEATURES if feature in there)


def adds_in_16_bits() -> bool:
    """Whether kernels for u8 x s8 add pairs of products in 16 bits here: on x86 without VNNI (``pairs.py``)."""
    there = features().split()
    return "avx2" in there and not {"avx_vnni", "avx512_vnni", "amx_int8"} & set(there)


def described() -> str:
    """Processor and features in one line."""
    return f"{processor()} ({features() or 'instruction sets unknown'})"


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpuinfo(*fields: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return []
    pairs = [line.partition(":") for line in lines]
    return [value.strip() for key, _, value in pairs if key.strip() in fields]
