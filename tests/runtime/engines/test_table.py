"""How an engine is added: a runner, a receipt, a row of the table, and a target for the graphs that it wants."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pytest
from nets.qdq_graphs import layer

from tfmq_export.bundle.manifest import Bundle, LayerInfo, open_bundle
from tfmq_export.errors import ConfigError, DependencyError
from tfmq_export.runtime import engines, load
from tfmq_export.runtime.engines.open import engine_version, require_engine
from tfmq_export.runtime.engines.realized import realized, realized_by_target
from tfmq_export.runtime.engines.table import ENGINES, Engine
from tfmq_export.runtime.measure.receipt import LayerReceipt, Receipt, total_macs
from tfmq_export.runtime.runner import GraphRequest
from tfmq_export.target import TARGETS, Target, find_target

Write = Callable[..., Path]

NOISE = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)


class AbacusRunner:
    """The one graph it knows is that of ``tiny_bundle``: ``sample / 2 + timestep / 1000``."""

    inputs = ("sample", "timestep")
    outputs = ("prediction",)

    def __init__(self, threads: int | None) -> None:
        self.engine = f"abacus 1.0 with {threads} threads"

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        noise_level = feeds["timestep"].reshape(-1, 1, 1, 1) / np.float32(1000)
        return {"prediction": (feeds["sample"] / 2 + noise_level).astype(np.float32)}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


def open_graph(request: GraphRequest) -> AbacusRunner:
    return AbacusRunner(request.threads)


def realized_on_abacus(model: Path | Bundle, requested: Sequence[LayerInfo], *, macs: int | None = None) -> Receipt:
    return Receipt(tuple(LayerReceipt(each, ("beads",), "") for each in requested), (), total_macs(requested, macs))


ABACUS = Engine(
    "abacus",
    "Abacus",
    open_graph=open_graph,
    receipt=realized_on_abacus,
    versions={"abacus": lambda: "1.0"},
    installed=lambda: True,
    missing="{target}: there is no abacus; pip install abacus",
)


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine], None]:
    """Add an engine's row and a target of its name, for the time of a test."""

    def add(engine: Engine) -> None:
        monkeypatch.setitem(ENGINES, engine.name, engine)
        monkeypatch.setitem(TARGETS, engine.name, Target(engine.name, engine=engine.name))

    return add


@pytest.mark.parametrize("backend", ["abacus", "auto"])
def test_a_row_is_all_that_opens_a_bundle_on_its_engine(
    backend: str, add: Callable[[Engine], None], tiny_bundle: Write
) -> None:
    add(ABACUS)

    with load(tiny_bundle(target="abacus"), backend=backend, threads=3) as denoise:
        prediction = denoise(NOISE, np.asarray([750, 250]))

    assert denoise.engine == "abacus 1.0 with 3 threads"
    np.testing.assert_allclose(prediction, NOISE / 2 + np.reshape([0.75, 0.25], (2, 1, 1, 1)), rtol=1e-6)
    assert engine_version("abacus") == "abacus 1.0"


def test_a_row_is_all_that_reads_its_receipt(add: Callable[[Engine], None], tiny_bundle: Write) -> None:
    add(ABACUS)
    bundle = open_bundle(tiny_bundle(target="abacus"))
    bundle = replace(bundle, manifest=replace(bundle.manifest, layers=(layer("conv2d"),), macs=200))

    by_name, by_target = realized(bundle.model, bundle.manifest.layers, "abacus"), realized_by_target(bundle)

    assert by_name.rows == by_target.rows == (LayerReceipt(layer("conv2d"), ("beads",), ""),)
    assert by_target.integer_share == 0.5


def test_what_is_missing_is_asked_for_and_onnxruntime_takes_its_place(
    add: Callable[[Engine], None], tiny_bundle: Write, caplog: pytest.LogCaptureFixture
) -> None:
    add(replace(ABACUS, installed=lambda: False))

    with pytest.raises(DependencyError, match=r"^abacus: there is no abacus; pip install abacus$"):
        require_engine(find_target("abacus"))
    with load(tiny_bundle(target="abacus")) as denoise:
        assert denoise.engine.startswith("onnxruntime ")
    assert "was compiled for abacus, which is not installed; on ONNX Runtime" in caplog.text


def test_an_engine_runs_its_own_targets_graphs_unless_its_row_says_all(
    add: Callable[[Engine], None], tiny_bundle: Write
) -> None:
    root = tiny_bundle(target="ort-cpu")

    add(ABACUS)
    with pytest.raises(ConfigError, match=r"for ort-cpu; Abacus computes such a graph wrongly; .* --target abacus"):
        load(root, backend="abacus")
    add(replace(ABACUS, every_target=True))
    with load(root, backend="abacus") as denoise:
        assert denoise.engine.startswith("abacus ")


def test_without_a_row_there_is_no_such_engine(tiny_bundle: Write) -> None:
    with pytest.raises(ConfigError, match="backend 'abacus' is unknown"):
        load(tiny_bundle(), backend="abacus")


def test_each_folder_has_a_runner_and_a_receipt_and_one_row() -> None:
    folders = {path.parent.name for path in Path(engines.__file__).parent.glob("*/__init__.py")}

    assert folders == ENGINES.keys() == {engine.name for engine in ENGINES.values()}
    for name, engine in ENGINES.items():
        assert engine.open_graph.__module__ == f"{engines.__name__}.{name}.runner"
        assert engine.receipt.__module__ == f"{engines.__name__}.{name}.receipt"


def test_a_backend_is_one_engines_and_each_target_has_an_engine() -> None:
    backends = [backend for engine in ENGINES.values() for backend in engine.versions]

    assert len(set(backends)) == len(backends)
    assert ENGINES.keys() <= set(backends)  # "auto" and reports name an engine by its own name
    assert {target.engine for target in TARGETS.values()} == ENGINES.keys()
