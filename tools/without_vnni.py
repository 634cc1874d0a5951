"""Run a command as on a CPU that has AVX2 and no VNNI, at full speed.

    python tools/without_vnni.py pytest -q
    python tools/without_vnni.py tfmq-export examples/emoji32/model.pt

ONNX Runtime and OpenVINO ask the CPU once which kernels it can run (the instruction ``cpuid``). Here they run from
copies in which that instruction is an invalid one, and a handler answers for it, without AVX-512, VNNI and AMX. So they
choose the kernels of AMD Zen 1 to 3 and Intel Haswell to Skylake, ``vpmaddubsw`` and its 16-bit sums among them, which
the CPU then really executes; /proc/cpuinfo, which reports quote, says the same. Needs gcc, objdump and x86-64 Linux;
the copies lie in ``--cache``.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ENGINES = ("onnxruntime", "openvino")
NOT_NEEDED = ("*providers_cuda*", "*providers_tensorrt*", "*gpu_plugin*", "*npu_plugin*", "__pycache__")
ASKING = ("onnxruntime/capi/*.so*", "openvino/libs/libopenvino.so*", "openvino/libs/libopenvino_intel_cpu_plugin.so")
CPUID, INVALID = b"\x0f\xa2", b"\x0f\x0b"
NEWER = re.compile(r" (avx512\w*|avx_vnni\w*|amx_\w+)")
"""Words of /proc/cpuinfo for what such a CPU lacks."""
LOAD = 1  # an ELF segment that is mapped

HANDLER = r"""
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define BIT(n) (1u << (n))
static int (*kernel_sigaction)(int, const struct sigaction *, struct sigaction *);

static void answer(int number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const uint8_t *code = (const uint8_t *)registers[REG_RIP];
  uint32_t leaf = registers[REG_RAX], part = registers[REG_RCX], a, b, c, d;
  if (code[0] != 0x0f || code[1] != 0x0b) { signal(SIGILL, SIG_DFL); return; }
  __cpuid_count(leaf, part, a, b, c, d);
  if (leaf == 7 && part == 0) {
    b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31)); /* AVX-512 */
    c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14)); /* VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
    d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25)); /* AVX-512, AMX */
  }
  if (leaf == 7 && part == 1) {
    a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23)); /* AVX-VNNI, BF16, AMX-FP16, AVX-IFMA */
    d &= ~(BIT(4) | BIT(5) | BIT(10) | BIT(19)); /* AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16, AVX10 */
  }
  registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

/* Python's faulthandler, which pytest turns on, would take the signal. */
int sigaction(int number, const struct sigaction *new, struct sigaction *old) {
  if (!kernel_sigaction) kernel_sigaction = dlsym(RTLD_NEXT, "sigaction");
  return kernel_sigaction(number, number == SIGILL ? 0 : new, old);
}

/* What the processor says of itself in words has to agree. */
static int opened(const char *name, const char *path, int flags, int mode) {
  int (*open_file)(const char *, int, ...) = dlsym(RTLD_NEXT, name);
  return open_file(strcmp(path, "/proc/cpuinfo") ? path : getenv("WITHOUT_VNNI_CPUINFO"), flags, mode);
}

static int mode_of(int flags, va_list rest) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0; }

int open(const char *path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  int mode = mode_of(flags, rest);
  va_end(rest);
  return opened("open", path, flags, mode);
}

int open64(const char *path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  int mode = mode_of(flags, rest);
  va_end(rest);
  return opened("open64", path, flags, mode);
}

__attribute__((constructor)) static void start(void) {
  struct sigaction handler = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
  kernel_sigaction = dlsym(RTLD_NEXT, "sigaction");
  kernel_sigaction(SIGILL, &handler, 0);
}
"""


def main() -> None:
    """Prepare once, then become the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "tfmq-without-vnni")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if not options.command:
        parser.error("give a command")
    environment = prepared(options.cache)
    program = shutil.which(options.command[0], path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if program is None:
        parser.error(f"{options.command[0]}: not found")
    os.execve(program, [program, *options.command[1:]], {**os.environ, **environment})


def prepared(cache: Path) -> dict[str, str]:
    """The environment that makes engines ask the handler; its files are made where they are missing."""
    installed = {name: spec for name in ENGINES if (spec := importlib.util.find_spec(name)) and spec.origin}
    versions = [
        name + importlib.metadata.version("onnxruntime-gpu" if name == ENGINES[0] else name) for name in installed
    ]
    folder = cache / hashlib.sha256(" ".join([HANDLER, *versions]).encode()).hexdigest()[:16]
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as partial:
            fill(Path(partial) / "made", {name: Path(str(spec.origin)).parent for name, spec in installed.items()})
            with contextlib.suppress(OSError):  # another process was faster
                (Path(partial) / "made").rename(folder)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"LD_PRELOAD": str(folder / "handler.so"), "WITHOUT_VNNI_CPUINFO": str(folder / "cpuinfo")}
    return {"PYTHONPATH": os.pathsep.join(paths), **environment}


def fill(folder: Path, packages: dict[str, Path]) -> None:
    """Compile the handler, and copy the engines with their questions replaced."""
    folder.mkdir()
    (folder / "cpuinfo").write_text(NEWER.sub("", Path("/proc/cpuinfo").read_text()))
    (folder / "handler.c").write_text(HANDLER)
    compiler = ["gcc", "-O1", "-shared", "-fPIC", str(folder / "handler.c"), "-o", str(folder / "handler.so"), "-ldl"]
    subprocess.run(compiler, check=True)
    for name, source in packages.items():
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns(*NOT_NEEDED))
    for library in (path for pattern in ASKING for path in folder.glob(pattern)):
        replace_questions(library)


def replace_questions(library: Path) -> None:
    """Make every ``cpuid`` of a library an invalid instruction."""
    disassembly = ["objdump", "-d", "--no-show-raw-insn", str(library)]
    text = subprocess.run(disassembly, capture_output=True, text=True, check=True).stdout
    data = bytearray(library.read_bytes())
    mapped = list(segments(data))
    for found in re.findall(r"^ *([0-9a-f]+):\s+cpuid *$", text, re.MULTILINE):
        address = int(found, 16)
        (place,) = (offset + address - start for start, offset, size in mapped if start <= address < start + size)
        assert data[place : place + 2] == CPUID
        data[place : place + 2] = INVALID
    library.write_bytes(data)


def segments(data: bytearray) -> Iterator[tuple[int, int, int]]:
    """Address, place in the file and size of everything that is mapped from an ELF64 file."""
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    for index in range(count):
        kind, _, offset, address, _, length = struct.unpack_from("<IIQQQQ", data, table + index * size)
        if kind == LOAD:
            yield address, offset, length


if __name__ == "__main__":
    main()
