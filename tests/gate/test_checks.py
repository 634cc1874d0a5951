"""What a gate lets through, and what it says of what it does not."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from standins.small_bundle import Parts, small_bundle

from tfmq_export.bundle.manifest import LayerInfo, open_bundle
from tfmq_export.errors import AccuracyError
from tfmq_export.gate import check_release, make_golden, write_golden
from tfmq_export.gate.checks import worst_first

LOOSE = "images = 1\n[model.thresholds]\npsnr = -100\nsqnr = -100"
Write = Callable[..., Path]


def failures(gate: Path, bundle: Path | None = None) -> dict[str, str]:
    """What each failing check says, by its name."""
    with pytest.raises(AccuracyError) as caught:
        check_release(gate, bundle)
    text = str(caught.value)
    parts = re.split(r"^(files|host|receipt|predictions|images|model): ", text, flags=re.MULTILINE)
    assert " does not pass " in parts[0]
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_a_good_bundle_passes_every_check(gate_file: Write) -> None:
    results = check_release(gate_file("sqnr = 30\npsnr = 30", "integer_share = 0.8", LOOSE))

    assert [result.check for result in results] == ["files", "host", "receipt", "predictions", "images", "model"]
    assert all(result.passed for result in results)
    said = {result.check: result.summary for result in results}
    assert "45 of 45 layers in integers" in said["receipt"]
    assert said["predictions"].startswith("0 of 3 timesteps below 30 dB")


def test_an_altered_scale_fails_once_by_its_hash(gate_file: Write, altered: Any) -> None:
    said = failures(gate_file("sqnr = 30"), altered(0.25, rehashed=False))

    assert re.search(r"unet/model.onnx: differs from the manifest's hash.*\nnext: compile it again", said["files"])
    assert said.keys() == {"files"}


def test_an_altered_scale_with_its_hash_fails_by_its_numbers(gate_file: Write, altered: Any) -> None:
    said = failures(gate_file("sqnr = 30\npsnr = 60"), altered(0.25, rehashed=True))

    assert "files" not in said
    assert "3 of 3 timesteps below 30 dB of tiny.golden.json" in said["predictions"]
    for timestep in (666, 333, 0):
        line = re.search(rf"timestep {timestep}: SQNR ([-\d.]+) dB, asked >= 30 \(rms", said["predictions"])
        assert line is not None
        assert float(line[1]) < 30
    assert "next: compare with the float model (tfmq-validate" in said["predictions"]
    assert re.search(r"image 0: PSNR [-\d.]+ dB, asked >= 60\n", said["images"])


def test_a_threshold_that_no_difference_meets_fails(
    release: Any, gate_file: Write, altered: Any, tmp_path: Path
) -> None:
    near = tmp_path / "near.golden.json"
    write_golden(make_golden(open_bundle(altered(1.01, rehashed=True))), near)

    check_release(gate_file(f'file = "{near}"\nsqnr = 15\npsnr = 15'))
    said = failures(gate_file(f'file = "{near}"\nsqnr = 300\npsnr = 300', "integer_share = 0.99"))

    assert "asked >= 300" in said["predictions"]
    assert "asked >= 300" in said["images"]
    assert re.search(r"share of the MACs in integers: 8\d\.\d%, asked >= 99.0%", said["receipt"])


def test_a_threshold_that_the_float_model_does_not_meet_fails(gate_file: Write) -> None:
    said = failures(gate_file(None, model=LOOSE.replace("psnr = -100", "psnr = 300")))

    assert re.search(r"image PSNR \(dB\) [\d.]+, asked >= 300\n", said["model"])
    assert re.search(r"least SQNR at timesteps \d+ \([\d.]+ dB\), \d+ ", said["model"])


def test_a_threshold_on_guidance_of_a_model_without_any_is_refused(gate_file: Write) -> None:
    said = failures(gate_file(None, model=f"{LOOSE}\nguidance = 0.9"))

    assert "its sampler shows no classifier-free guidance" in said["model"]
    assert "next: leave out --min-guidance (thresholds.guidance)" in said["model"]


def test_another_models_bundle_is_named(gate_file: Write, tmp_path: Path) -> None:
    said = failures(gate_file(), small_bundle(tmp_path / "other").root)

    other = r"was written for another model \(.*\) than this bundle \(small, ffffffffffff\)"
    assert re.search(other, said["predictions"])
    assert "next: take that model's bundle, or write a golden for this one" in said["predictions"]


def test_another_float_model_is_named(release: Any, gate_file: Write, tmp_path: Path) -> None:
    shutil.copytree(release.model, tmp_path / "other")
    other = UNet2DModel.from_pretrained(tmp_path / "other")
    with torch.no_grad():
        other.conv_in.weight.mul_(1.01)
    other.save_pretrained(tmp_path / "other")

    said = failures(gate_file(None, model=f'path = "{tmp_path / "other"}"\n{LOOSE}'))

    assert "was not compiled from" in said["model"]


def test_another_schedule_is_named(gate_file: Write, release: Any, tmp_path: Path) -> None:
    print_of = open_bundle(release.bundle).manifest.fingerprint

    said = failures(gate_file(), small_bundle(tmp_path / "other", fingerprint=print_of).root)

    assert "has 3 timesteps (666, 333, 0), this bundle 4 (750, 500, 250, 0)" in said["predictions"]


def test_other_conditioning_is_named(gate_file: Write, tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out", Parts(label=True))
    labels = tmp_path / "out/tfmq/conditioning.npz"
    np.savez(labels, label=np.arange(4))
    write_golden(make_golden(bundle), tmp_path / "small.golden.json")
    gate = gate_file(f'file = "{tmp_path / "small.golden.json"}"')
    check_release(gate, bundle.root)

    np.savez(labels, label=np.arange(4) + 1)

    assert "was asked with other conditioning examples" in failures(gate, bundle.root)["predictions"]


def test_a_truncated_graph_is_one_failure_that_says_why(release: Any, gate_file: Write, tmp_path: Path) -> None:
    shutil.copytree(release.bundle, tmp_path / "out")
    graph = tmp_path / "out/unet/model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1000])

    said = failures(gate_file(), tmp_path / "out")

    assert said.keys() == {"files"}
    assert "(truncated or altered)" in said["files"]


def test_a_missing_bundle_is_one_failure(gate_file: Write, tmp_path: Path) -> None:
    said = failures(gate_file(), tmp_path / "none")

    assert said.keys() == {"files"}
    assert "not a bundle" in said["files"]


def test_a_golden_that_fits_no_check_is_one_failure(gate_file: Write, tmp_path: Path) -> None:
    said = failures(gate_file(f'file = "{tmp_path / "none.json"}"'))

    assert said.keys() == {"predictions"}
    assert "none.json" in said["predictions"]


def test_the_worst_miss_comes_first(gate_file: Write, altered: Any) -> None:
    said = failures(gate_file("sqnr = 90\npsnr = 90"), altered(0.5, rehashed=True))

    for check, pattern in (("predictions", r"SQNR ([-\d.]+) dB, asked"), ("images", r"PSNR ([-\d.]+) dB, asked")):
        missed = [float(value) for value in re.findall(pattern, said[check])]
        assert len(missed) > 1
        assert missed == sorted(missed)


def test_nan_is_the_worst_of_all() -> None:
    assert worst_first([3.0, float("nan"), -1.0]) == [1, 2, 0]


def test_a_layer_lost_to_floating_point_is_named(tmp_path: Path, gate_file: Write) -> None:
    layer = LayerInfo("conv2d", "down.conv", "conv", 100, 8, 8)
    bundle = small_bundle(tmp_path / "out", layers=(layer,), macs=100)

    said = failures(gate_file(None), bundle.root)

    assert "down.conv: no operation node_conv2d in the optimized graph" in said["receipt"]
    assert "0 of 1 layers in integers" in said["receipt"]
    check_release(gate_file(None, "allow_precision_loss = true"), bundle.root)


def test_a_bundle_whose_sampler_is_not_ours_is_checked_without_images(tmp_path: Path, gate_file: Write) -> None:
    bundle = small_bundle(tmp_path / "out")  # brings no scheduler
    write_golden(make_golden(bundle), tmp_path / "small.golden.json")

    results = check_release(gate_file(f'file = "{tmp_path / "small.golden.json"}"'), bundle.root)

    assert results[-1].skipped
    assert results[-1].summary.startswith("not compared: small.golden.json has none, for gates draw with linear")
    assert results[-2].summary.startswith("0 of 4 timesteps below")
