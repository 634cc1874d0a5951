"""Two attentions whose results are added: OpenVINO 2026.4 ends the process while it generates kernels for them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

from tfmq_export.runtime.engines.onnxruntime.runner import OrtRunner

pytest.importorskip("openvino")

# Of Lumina Next: a token attends to the picture, and through a gate of each head to the prompt.
GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
two (float[batch, 6, 4, 8] q, float[batch, 5, 4, 8] k, float[batch, 5, 4, 8] v) => (float[batch, 6, 4, 8] out)
<float[1, 1, 4, 1] gate = {0.5, 0.25, 1.0, 2.0}>
{
 heads_q = Transpose<perm = [0, 2, 1, 3]>(q)
 heads_k = Transpose<perm = [0, 2, 3, 1]>(k)
 heads_v = Transpose<perm = [0, 2, 1, 3]>(v)
 scores = MatMul(heads_q, heads_k)
 weights = Softmax<axis = -1>(scores)
 seen = MatMul(weights, heads_v)
 rows = Transpose<perm = [0, 2, 1, 3]>(seen)
 other_q = Mul(heads_q, heads_q)
 other_scores = MatMul(other_q, heads_k)
 other_weights = Softmax<axis = -1>(other_scores)
 other_seen = MatMul(other_weights, heads_v)
 other_rows = Transpose<perm = [0, 2, 1, 3]>(other_seen)
 gated = Mul(other_rows, gate)
 out = Add(rows, gated)
}
"""

# In a process of its own, which may be the one that ends.
RUN = """
import sys
from pathlib import Path
import numpy as np
from tfmq_export.runtime.engines.openvino.runner import OpenVinoRunner
with OpenVinoRunner(Path(sys.argv[1]), integer=sys.argv[3] == "integer") as runner:
    np.save(sys.argv[2] + ".out.npy", runner.infer(dict(np.load(sys.argv[2])))["out"])
"""


@pytest.mark.parametrize("numerics", ["integer", "float"])
def test_attentions_that_meet_do_not_end_the_process(tmp_path: Path, numerics: str) -> None:
    graph, given = tmp_path / "two.onnx", tmp_path / "given.npz"
    onnx.save(parser.parse_model(GRAPH), graph)
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 6, 4, 8), "k": (2, 5, 4, 8), "v": (2, 5, 4, 8)}
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    np.savez(given, **feeds)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(graph), str(given), numerics], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with OrtRunner(graph) as runner:
        expected = runner.infer(feeds)["out"]
    np.testing.assert_allclose(np.load(f"{given}.out.npy"), expected, rtol=1e-5, atol=1e-6)
