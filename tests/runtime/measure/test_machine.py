"""What a host says of itself in /proc/cpuinfo, and what follows for its integer kernels."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tfmq_export.runtime.measure import machine
from tfmq_export.runtime.measure.machine import adds_in_16_bits, described, features, processor

AVX512 = "avx512f avx512dq avx512cd avx512bw avx512vl"

# (words of the host's line, the features that matter among them, whether pairs of products are added in 16 bits)
HOSTS = {
    "Haswell": ("sse4_2 avx f16c fma avx2 bmi2", "avx2", True),
    "Zen 3": ("sse4_2 avx avx2 sha_ni vaes vpclmulqdq rdpid", "avx2", True),
    "Skylake server": (f"avx avx2 {AVX512} clwb", "avx2 avx512f", True),
    "Cascade Lake": (f"avx avx2 {AVX512} avx512_vnni", "avx2 avx512f avx512_vnni", False),
    "Zen 4": (f"avx avx2 {AVX512} avx512_bf16 avx512_vnni", "avx2 avx512f avx512_vnni avx512_bf16", False),
    "Alder Lake": ("avx avx2 avx_vnni gfni serialize", "avx2 avx_vnni", False),
    "Sapphire Rapids": (
        f"avx avx2 avx_vnni {AVX512} avx512_bf16 avx512_vnni amx_bf16 avx512_fp16 amx_tile amx_int8",
        "avx2 avx512f avx_vnni avx512_vnni avx512_bf16 amx_int8 amx_bf16",
        False,
    ),
}


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Give the host another /proc/cpuinfo; without a call it has none."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "Path", lambda name: {"/proc/cpuinfo": path}[name])

    def write(text: str) -> None:
        path.write_text(text, "utf-8")

    return write


@pytest.mark.parametrize("name", HOSTS)
def test_an_x86_host_adds_in_16_bits_unless_it_has_vnni(name: str, cpuinfo: Callable[[str], None]) -> None:
    words, known, narrow = HOSTS[name]
    core = f"processor\t: 0\nmodel name\t: {name}\nflags\t\t: fpu vme {words}\nvmx flags\t: vnmi\nbugs\t\t:\n\n"
    cpuinfo(2 * core)

    assert features() == known
    assert adds_in_16_bits() is narrow
    assert processor().endswith(f" x {name}")
    assert described() == f"{processor()} ({known})"


def test_words_are_whole(cpuinfo: Callable[[str], None]) -> None:
    cpuinfo("flags\t: avx2x xavx_vnni avx512_vnni2\nmodel name\t: avx2\n")

    assert features() == ""


def test_an_arm_host_names_its_features_otherwise_and_saturates_nothing(cpuinfo: Callable[[str], None]) -> None:
    cpuinfo("processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd atomics asimddp i8mm bf16\nCPU part\t: 0xd40\n")

    assert features() == "asimddp i8mm"
    assert not adds_in_16_bits()


@pytest.mark.usefixtures("cpuinfo")
def test_a_system_that_does_not_tell_is_no_reason_to_warn() -> None:
    assert features() == ""
    assert not adds_in_16_bits()
    assert described() == f"{processor()} (instruction sets unknown)"
