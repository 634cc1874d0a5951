"""Run a bundle where only numpy and onnxruntime are installed.

    python tools/check_runtime_only.py OUT

Fails if torch can be imported here, or if the runtime needs it.
"""

import importlib.util
import sys
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
