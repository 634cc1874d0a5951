"""Write down the Python API of TensorRT, and the C API of the CUDA driver, that this project calls.

    pip install --no-deps --target FOLDER tensorrt-cu13-bindings     # or tensorrt-cu12-bindings==10.*
    python tools/tensorrt_api.py tensorrt FOLDER > tests/golden/tensorrt_11.json
    pip install --no-deps --target FOLDER nvidia-cuda-runtime
    python tools/tensorrt_api.py cuda FOLDER/nvidia/cu13/include/cuda.h > tests/golden/cuda_driver.json

Prints JSON for ``tests/golden/``; tests hold our calls to it. TensorRT's bindings carry the whole Python API but link
libraries of gigabytes. Their classes do not need them until an object is made: a C compiler makes empty ones here.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from tfmq_export.runtime.engines.tensorrt import api as trt_api
from tfmq_export.runtime.engines.tensorrt.cuda_driver import PROTOTYPES

_SIGNATURE = re.compile(r"^(?:\d+\. )?(\w+)\((.*)\) -> .*$")


def describe(module: ModuleType) -> dict[str, object]:
    """Version, members of the classes that ``trt_api`` names, members of each enum, and names of the rest."""
    classes = {name for name, value in vars(trt_api).items() if getattr(value, "_is_protocol", False)}
    return {
        "version": module.__version__,
        "classes": {
            name: {member: signatures(getattr(kind, member)) for member in dir(kind) if not member.startswith("_")}
            for name, kind in ((name, getattr(module, name, None)) for name in sorted(classes))
            if kind is not None
        },
        "enums": {
            name: sorted(value.__members__) for name, value in vars(module).items() if hasattr(value, "__members__")
        },
        "names": sorted(name for name in dir(module) if not name.startswith("__") or name == "__version__"),
    }


def signatures(member: object) -> list[str] | None:
    """Parameters of each overload, less ``self``, ``name=`` where one may be left out; None for a property."""
    if isinstance(member, property):
        return None
    found = [_SIGNATURE.match(line.strip()) for line in (getattr(member, "__doc__", None) or "").splitlines()]
    overloads = [match[2] for match in found if match is not None and "*args" not in match[2]]
    return [", ".join(_parameters(text)[1:]) for text in overloads]


def _parameters(text: str) -> list[str]:
    """Names of ``a: int, b: tuple[int, int] = (1, 2)``: commas inside brackets separate nothing."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.partition(":")[0].strip() + ("=" if " = " in part else "") for part in parts if part.strip()]


def import_bindings(folder: Path) -> ModuleType:
    """Import TensorRT's bindings beside empty libraries in place of TensorRT itself."""
    (binary,) = folder.glob("tensorrt_bindings/tensorrt.so")
    needed = re.findall(r"\[(libnv\S+)\]", _output("readelf", "-d", str(binary)))
    symbols = re.findall(r"\bU (\w+)$", _output("nm", "-D", "--undefined-only", str(binary)), re.MULTILINE)
    empty = "\n".join(f"void {name}(void) {{}}" for name in symbols if not name.startswith(("Py", "_Py")))
    with tempfile.TemporaryDirectory() as stubs:
        source = Path(stubs) / "empty.c"
        source.write_text(empty if empty else "int nothing;")
        for library in needed:
            _output("cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library}", "-o", f"{stubs}/{library}", str(source))
            _preload(f"{stubs}/{library}")
        sys.path.insert(0, str(folder))
        return importlib.import_module("tensorrt_bindings")


def _preload(path: str) -> None:
    import ctypes

    ctypes.CDLL(path)  # the loader then finds it by its soname


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cuda_prototypes(header: Path) -> dict[str, list[str]]:
    """Parameter types of the driver's functions that we call, by the name in the library."""
    text = header.read_text("utf-8", errors="replace")
    # cuda.h declares cuMemAlloc, and renames it to cuMemAlloc_v2 with the preprocessor.
    pairs = re.findall(r"^ *#define (cu\w+)\s+(?:__CUDA_API_\w+\()?(cu\w+)", text, re.MULTILINE)
    renamed = {new: old for old, new in pairs if new != old}
    found = {}
    for symbol in PROTOTYPES:
        declared = re.search(rf"^CUresult CUDAAPI {renamed.get(symbol, symbol)}\(([^;]*)\);", text, re.MULTILINE)
        if declared is None or symbol in renamed.values():
            raise SystemExit(f"{header}: {symbol} is not what cuda.h calls")
        found[symbol] = [_type(parameter) for parameter in declared[1].split(",")]
    return found


def _type(parameter: str) -> str:
    """``const void *srcHost`` -> ``const void *``."""
    return re.sub(r"\w+$", "", " ".join(parameter.split())).strip()


def main(kind: str, place: str) -> None:
    """Print one of the two."""
    found = describe(import_bindings(Path(place))) if kind == "tensorrt" else cuda_prototypes(Path(place))
    print(json.dumps(found, indent=1, sort_keys=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
