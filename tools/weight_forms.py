"""What the pair rule costs in time, against other ways to be right on every CPU: in turns, in one run.

    python tools/weight_forms.py --float OUT/fp32 --weights OUT/vnni OUT/any

Every bundle is timed as it is; of the last one also with its weights as uint8 around 128, which ONNX Runtime multiplies
in kernels that cannot saturate. Run it again under tools/without_vnni.py for a CPU without VNNI.
"""

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from tfmq_export.bundle.manifest import open_bundle
from tfmq_export.recipe.names import is_weight_codes
from tfmq_export.runtime.engines.onnxruntime.runner import OrtRunner
from tfmq_export.runtime.graph_file import read_model
from tfmq_export.runtime.measure.machine import described

MIDDLE = 128


def main() -> None:
    """Time all forms, round by round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--float", type=Path, required=True, help="a bundle of preset fp32: what speed is a multiple of"
    )
    parser.add_argument("--weights", type=Path, nargs="+", required=True, help="bundles to time")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    manifest = open_bundle(args.float).manifest
    with ExitStack() as opened:
        unsigned = Path(opened.enter_context(tempfile.TemporaryDirectory())) / "model.onnx"
        model = read_model(open_bundle(args.weights[-1]).model, weights=True)
        onnx.save_model(with_unsigned_weights(model), str(unsigned))
        paths = {str(root): open_bundle(root).model for root in (args.float, *args.weights)}
        paths[f"{args.weights[-1]}, weights as uint8"] = unsigned
        runners = {name: opened.enter_context(OrtRunner(path, threads=args.threads)) for name, path in paths.items()}
        rng = np.random.default_rng(0)
        feeds = {x.name: rng.standard_normal((args.batch, *x.shape)).astype(x.dtype) for x in manifest.inputs}
        (timestep,) = manifest.input("timestep")
        feeds[timestep.name] = np.full(args.batch, manifest.timesteps.values[0], timestep.dtype)
        seconds: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(args.rounds):
            for name, runner in runners.items():
                start = time.perf_counter()
                runner.infer(feeds)
                seconds[name].append(time.perf_counter() - start)
    base = np.array(seconds[str(args.float)])
    print(f"{described()}, {args.threads} thread(s), batch {args.batch}, {args.rounds} rounds in turns")
    for name, times in seconds.items():
        print(f"{np.median(times) * 1e3:8.1f} ms  {np.median(base / np.array(times)):5.2f}x  {name}")


def with_unsigned_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with every stored int8 weight as uint8 around a zero point of 128."""
    stored = {item.name: item for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and is_weight_codes(node.input[0]):
            for value in (node.input[0], node.input[2]):
                item = stored[value]
                codes = numpy_helper.to_array(item)
                if codes.dtype == np.int8:
                    item.CopyFrom(numpy_helper.from_array((codes.astype(np.int16) + MIDDLE).astype(np.uint8), value))
    return model


if __name__ == "__main__":
    main()
