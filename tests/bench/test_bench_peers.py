"""The comparison with peers: what it measures, in which order, and what it writes."""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import bench_peers
import numpy as np
import onnx
import pytest
import torch
from engines import Call, Engine, Feeds
from nets.onnx_graphs import build, normal
from onnx import helper
from peer_measure import Candidate, Graph, HeldOut, Rounds, hold_out, measure
from peer_report import COLUMNS, Comparison, Result, console_table, markdown
from rich.console import Console

from tfmq_export.ptq.walk.calibration import CalibrationStep
from tfmq_export.runtime.measure.benchmark import Timing
from tfmq_export.runtime.measure.machine import adds_in_16_bits


@dataclass(frozen=True, slots=True)
class LoggedEngine(Engine):
    """ONNX Runtime that notes who is called."""

    log: list[str] = field(default_factory=list, compare=False)

    def open(self, path: Path, threads: int, example: Feeds) -> Call:
        call = Engine.open(self, path, threads, example)

        def logged(feeds: Feeds) -> object:
            self.log.append(path.parent.name)
            return call(feeds)

        return logged  # type: ignore[return-value]  # a Call is a function


def scaled(folder: Path, name: str, factor: float) -> Graph:
    """``y = factor * x``, alone in its folder."""
    path = folder / name / "model.onnx"
    path.parent.mkdir()
    node = helper.make_node("Mul", ["x", "factor"], ["y"])
    model = build([node], {"x": ["batch", 8]}, {"y": ["batch", 8]}, {"factor": np.float32([factor])})
    onnx.save_model(model, str(path))
    return Graph(name, path, (Engine("onnxruntime"),), lambda: None)


def held_out(timesteps: int = 2) -> list[HeldOut]:
    rows = [normal(seed, 1, 8) for seed in range(timesteps)]
    return [HeldOut(({"x": row},), row) for row in rows]


def candidates(graphs: Sequence[Graph], engine: Engine) -> list[Candidate]:
    return [Candidate(graph, engine) for graph in graphs]


def test_noise_of_a_tenth_is_20_db_at_every_timestep(tmp_path: Path) -> None:
    graphs = [scaled(tmp_path, "float", 1.0), scaled(tmp_path, "tenth", 1.1)]

    exact, tenth = measure(candidates(graphs, Engine("onnxruntime")), held_out(3), Rounds(1, 2), {})

    assert exact.sqnr == (np.inf,) * 3
    assert tenth.sqnr == pytest.approx((20.0,) * 3, abs=1e-4)
    assert exact.speedup == 1
    assert tenth.speedup == pytest.approx(np.median(np.divide(exact.timing.seconds, tenth.timing.seconds)))
    assert tenth.file_bytes == (tmp_path / "tenth" / "model.onnx").stat().st_size


def test_candidates_take_turns_and_each_round_starts_with_the_next(tmp_path: Path) -> None:
    engine = LoggedEngine("onnxruntime")
    graphs = [scaled(tmp_path, name, 1.0) for name in "abc"]

    measure(candidates(graphs, engine), held_out(1), Rounds(1, 3), {})

    turns = "".join(engine.log)[3:]  # the first call of each was judged
    assert turns[-9:] == "abc" + "bca" + "cab"
    assert all(set(turns[start : start + 3]) == set("abc") for start in range(0, len(turns), 3))


def test_a_graph_no_engine_takes_is_reported_and_the_others_are_timed(tmp_path: Path) -> None:
    graphs = [scaled(tmp_path, "float", 1.0), scaled(tmp_path, "broken", 1.0)]
    graphs[1].path.write_bytes(b"no graph")
    failures: dict[str, str] = {}

    (result,) = measure(candidates(graphs, Engine("onnxruntime")), held_out(), Rounds(1, 1), failures)

    assert result.made_by == "float"
    ((name, reason),) = failures.items()
    assert name.startswith("broken on onnxruntime")
    assert "InvalidProtobuf" in reason


def test_a_peer_that_fails_is_a_result_and_a_graph_that_exists_is_taken(tmp_path: Path) -> None:
    console, failures = Console(record=True), {}

    def refuse() -> None:
        raise ValueError("not supported\nfor weight")

    missing = Graph("peer", tmp_path / "peer" / "model.onnx", (), refuse)
    existing = Graph("kept", scaled(tmp_path, "kept", 1.0).path, (), refuse)

    assert not bench_peers.build(missing, failures, console)
    assert bench_peers.build(existing, failures, console)
    assert failures == {"peer": "ValueError: not supported for weight"}


def test_graphs_of_other_settings_are_refused(tmp_path: Path) -> None:
    bench_peers.claim(tmp_path / "kept", {"model": "ddpm", "steps": "4"})
    bench_peers.claim(tmp_path / "kept", {"model": "ddpm", "steps": "4"})

    with pytest.raises(SystemExit, match="another run"):
        bench_peers.claim(tmp_path / "kept", {"model": "ddpm", "steps": "8"})


def test_held_out_calls_have_the_batch_of_the_benchmark() -> None:
    sample = torch.arange(10.0).reshape(5, 2)
    step = CalibrationStep({"x": sample, "t": torch.tensor(7)}, 2 * sample)

    (found,) = hold_out([step], batch=2)

    assert [call["x"].tolist() for call in found.calls] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert [call["t"].shape for call in found.calls] == [(), ()]
    assert found.prediction.tolist() == (2 * sample[:4]).tolist()  # the fifth fills no batch


def test_a_bundle_takes_the_timestep_as_a_vector() -> None:
    call = {"x": np.zeros((1, 2), np.float32), "t": np.array(7)}
    make = partial(Graph, "g", Path("model.onnx"), (), lambda: None)

    assert make(bundle=False).feeds(call)["t"].shape == ()
    assert make(bundle=True).feeds(call)["t"].shape == (1,)


def comparison() -> Comparison:
    slow, fast = Timing((0.1, 0.2, 0.3)), Timing((0.05, 0.1, 0.15))
    results = tuple(
        Result(name, "openvino 2026.4.1, rest bf16", threads, timing, speedup, 1_500_000, (30.0, 20.0))
        for threads in (1, 2)
        for name, timing, speedup in (("float model", slow, 1.0), ("w8a8", fast, 2.0))
    )
    return Comparison({"baseline": "float model, onnxruntime 1.31"}, results, {"nncf": "ValueError: no [weights]"})


def test_every_row_says_engine_hints_and_threads_beside_its_figures() -> None:
    lines = markdown(comparison()).splitlines()

    assert "- baseline: float model, onnxruntime 1.31" in lines
    row = "| w8a8 | openvino 2026.4.1, rest bf16 | 2 | 100.00 [60.00, 140.00] | 2.00x | 1.50 | 25.0 (20.0) |"
    assert lines[-5] == row
    assert lines[-1] == "- nncf: ValueError: no [weights]"
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 4
    assert {line.count("|") for line in table} == {len(COLUMNS) + 1}


def test_the_console_shows_the_same_cells() -> None:
    console = Console(record=True, width=140)

    console.print(console_table(comparison()))

    text = console.export_text()
    for cell in comparison().results[-1].cells():
        assert cell in text
    assert "no [weights]" in text  # brackets are no markup here


def test_json_keeps_the_plain_figures() -> None:
    found = json.loads(json.dumps(comparison().to_json()))

    assert found["results"][1]["seconds"] == pytest.approx(
        {"median": 0.1, "p10": 0.06, "p90": 0.14, "p99": 0.149, "count": 3}
    )
    assert found["results"][1]["sqnr_db"] == [30.0, 20.0]
    assert found["failures"] == {"nncf": "ValueError: no [weights]"}


@pytest.mark.slow
@pytest.mark.parametrize("peers", [(), ("openvino", "nncf")])
def test_the_whole_comparison_runs(peers: tuple[str, ...], tmp_path: Path) -> None:
    for package in peers:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; pip install -e '.[peers]'")
    few = ["--threads", "1", "--rounds", "1", "--presets", "w8a8", "--images", "2", "--steps", "3"]

    bench_peers.main(["dit", "--size", "tiny", *few, "--output", str(tmp_path), *([] if peers else ["--ort-only"])])

    found = json.loads((tmp_path / "peers.json").read_text())
    assert found["failures"] == {}
    rows = {(row["graph"], row["engine"].rpartition(", rest ")[2]): row for row in found["results"]}
    assert len(rows) == (12 if peers else 4)
    sqnr = {graph: min(row["sqnr_db"]) for (graph, precision), row in rows.items() if precision != "bf16"}
    assert min(sqnr.pop("float model"), sqnr.pop("fp32 for ort-cpu")) > 80
    assert sqnr["w8a8 for ort-cpu"] > 15
    assert sqnr["quantize_static"] > (5 if adds_in_16_bits() else 15)  # the peer's weights saturate there
    sizes = {graph: row["file_bytes"] for (graph, _), row in rows.items()}
    assert sizes["w8a8 for ort-cpu"] < sizes["float model"] / 3
    assert (tmp_path / "peers.md").read_text().count("\n| ") == len(rows) + 1
