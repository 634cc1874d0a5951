import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from standins.small_bundle import Parts, small_bundle
from typer.testing import CliRunner

from tfmq_export.cli.golden import golden as golden_command
from tfmq_export.errors import AccuracyError, ConfigError, LoadError
from tfmq_export.gate import make_golden, read_golden, write_golden
from tfmq_export.gate.probe import probe_of


@pytest.mark.parametrize("parts", [Parts(), Parts(timesteps=(0.75, 0.1)), Parts(target="ort-cuda")], ids=str)
def test_a_golden_survives_its_file(parts: Parts, tmp_path: Path) -> None:
    golden = make_golden(small_bundle(tmp_path / "out", parts), samples=3, seed=5)

    write_golden(golden, tmp_path / "golden.json")

    assert read_golden(tmp_path / "golden.json") == golden
    assert len(golden.predictions) == len(parts.timesteps)
    assert (golden.samples, golden.seed, golden.inputs.size) == (3, 5, 3 * 3 * 8 * 8 * len(parts.timesteps))


def test_a_golden_is_the_same_each_time_and_another_with_another_seed(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out")

    assert make_golden(bundle) == make_golden(bundle)
    assert make_golden(bundle).inputs != make_golden(bundle, seed=1).inputs


def test_samples_lie_on_the_trajectory_of_the_scheduler(release: Any) -> None:
    from tfmq_export.bundle.manifest import open_bundle

    probe = probe_of(open_bundle(release.bundle), 2, 0)

    first, last = probe.levels[0], probe.levels[-1]
    assert np.square(probe.levels).sum(1) == pytest.approx(1)
    assert first[1] > 0.9  # the noisiest comes first
    assert last[0] > 0.99
    np.testing.assert_allclose(probe.sample(2), probe.picture, atol=0.1)


def test_a_bundle_that_predicts_nan_makes_no_golden(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out", Parts(label=True, timesteps=(3e38, 0.5)))
    np.savez(tmp_path / "out/tfmq/conditioning.npz", label=np.asarray([1]))
    graph = bundle.model.read_bytes().replace(np.float32(0.001).tobytes(), np.float32(1e30).tobytes())
    bundle.model.write_bytes(graph)
    manifest = json.loads((bundle.root / "tfmq/manifest.json").read_text())
    manifest["files"] = {}
    (bundle.root / "tfmq/manifest.json").write_text(json.dumps(manifest))

    from tfmq_export.bundle.manifest import open_bundle

    with pytest.raises(AccuracyError, match=r"NaN or infinity at timestep 3e\+38"):
        make_golden(open_bundle(bundle.root))


def test_conditioning_without_an_example_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no example of label in tfmq/conditioning\.npz"):
        make_golden(small_bundle(tmp_path / "out", Parts(label=True)))


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return write


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.write_text(path.read_text()[:-100]), "not a readable golden file"),
        (lambda path: path.unlink(), "No such file or directory; write it with `tfmq-golden OUT -o"),
        (edit(lambda data: data.update(schema=2)), "schema 2, this version reads 1"),
        (edit(lambda data: data.pop("peak")), "not a readable golden file"),
        (edit(lambda data: data.update(peak=0)), "images of span 0"),
        (edit(lambda data: data["predictions"][0].update(sketch="?")), "not a readable golden file"),
        (edit(lambda data: data.update(predictions=[])), "at least one timestep"),
    ],
)
def test_a_damaged_golden_is_refused(damage: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    write_golden(make_golden(small_bundle(tmp_path / "out")), path)
    damage(path)

    with pytest.raises(LoadError, match=says):
        read_golden(path)


def test_the_command_writes_the_same_file(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out")
    write_golden(make_golden(bundle, samples=1), tmp_path / "wanted.json")
    app = typer.Typer()
    app.command()(golden_command)

    done = CliRunner().invoke(app, [str(bundle.root), "-o", str(tmp_path / "got.json"), "--samples", "1"])

    assert done.exit_code == 0, done.output
    assert "4 timesteps, 0 images" in done.output
    assert (tmp_path / "got.json").read_text() == (tmp_path / "wanted.json").read_text()
