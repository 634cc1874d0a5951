"""Run a bundle, and the commands that need no torch, where only the base install and onnxruntime are.

    python tools/check_runtime_only.py OUT

Fails if torch can be imported here, if the runtime needs it, or if a command does not do what its inputs allow.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import tfmq_export.runtime


def main(bundle: Path) -> None:
    """Load, predict, refuse a wrong timestep."""
    assert importlib.util.find_spec("torch") is None, "torch is installed: this environment proves nothing"
    from tfmq_export.errors import TimestepError

    with tfmq_export.runtime.load(bundle, verify=True) as denoiser:
        (info,) = denoiser.bundle.manifest.input("sample")
        noise = np.random.default_rng(0).standard_normal((2, *(side or 1 for side in info.shape)), np.float32)
        prediction = denoiser(noise, denoiser.bundle.manifest.timesteps.values[0])
        assert prediction.shape == noise.shape
        assert np.isfinite(prediction).all()
        try:
            denoiser(noise, -7)
        except TimestepError as error:
            print(f"refused as it should: {error}")
        else:
            raise AssertionError("a timestep outside the schedule ran")
    heavy = {"torch", "onnx", "diffusers", "pydantic"} & set(sys.modules)
    assert not heavy, f"the runtime imported {heavy}"
    print("the runtime runs on numpy and onnxruntime alone")
    with tempfile.TemporaryDirectory() as folder:
        _commands(bundle, Path(folder))


def _commands(bundle: Path, folder: Path) -> None:
    """Every command that serves, on stored data: what each answers, and what it says it left out."""
    _run("validate", bundle, "--host")
    _run("golden", bundle, "-o", folder / "golden.json", "--samples", "1")
    _run("sample", bundle, "-o", folder / "grid.png", "--images", "2")
    timed = _run("bench", bundle, "--rounds", "3", "--json", folder / "bench.json")
    assert "not run: twin of" in timed, timed
    (setting,) = json.loads((folder / "bench.json").read_text("utf-8"))["settings"]
    assert all(row["seconds"]["median"] > 0 for row in setting["candidates"].values()), setting
    shown = _run("report", bundle, "--bench", folder / "bench.json")
    assert "no page written: it needs" in shown, shown
    assert " dB" in shown, shown


def _run(command: str, *arguments: object) -> str:
    """``tfmq-COMMAND`` of this environment; what it prints."""
    words = [str(Path(sys.executable).with_name(f"tfmq-{command}")), *map(str, arguments)]
    print("+", *words)
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
