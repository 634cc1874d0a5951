"""Weights for CPUs with VNNI only, and the CPU targets that a recipe of them is compiled for."""

from pathlib import Path

import pytest
from nets.handwritten import PLAIN, build_edm, quantized

from tfmq_export.compiler.chain import Compiled, compile_model
from tfmq_export.compiler.settings import check_pairs, recipe_as_asked
from tfmq_export.compiler.steps import quantize
from tfmq_export.config import CompileConfig, Method, Thresholds
from tfmq_export.errors import TargetError
from tfmq_export.recipe.io import load_recipe, save_recipe
from tfmq_export.recipe.pairs import PAIR_SUM
from tfmq_export.target import find_target

ANYTHING = Thresholds(psnr=-100, sqnr=-100, kernels=-1000)
"""On a host without VNNI its kernels are wrong, which is not what is asked here."""


@pytest.fixture(scope="module")
def for_vnni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe as an older version made them: nobody had asked it to spare the weights."""
    folder = tmp_path_factory.mktemp("recipe")
    made = quantized("edm", 8, 8, PLAIN.model_copy(update={"cpus": "vnni"}))
    save_recipe(made.recipe, folder)
    return folder


def compiled(recipe: Path, out: Path, target: str, method: Method) -> Compiled:
    config = CompileConfig(
        target=target, method=method, validation_images=1, thresholds=ANYTHING, allow_precision_loss=True
    )
    return compile_model(build_edm(), out, config, recipe=recipe)


@pytest.mark.parametrize("target", ["ort-cpu", "openvino", "ort-cuda"])
def test_a_recipe_that_saturates_somewhere_leaves_no_bundle(for_vnni: Path, tmp_path: Path, target: str) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")

    with pytest.raises(
        TargetError, match=rf"saturate on CPUs without VNNI .* for {target} on any CPU, or .* --cpus vnni"
    ):
        compiled(for_vnni, tmp_path / "out", target, Method())

    assert not list(tmp_path.iterdir())


def test_a_recipe_for_a_gpu_did_not_ask_for_vnni(tmp_path: Path) -> None:
    """Nothing saturates there, so its weights are not spared; on a CPU they would saturate."""
    config = CompileConfig(target="tensorrt", effort="fast", calibration_images=2)
    made = quantize(build_edm(), config)
    save_recipe(made.recipe, tmp_path)

    assert made.recipe.provenance["cpus"] == "any"
    assert max(layer.largest_pair for layer in made.recipe.layers) > PAIR_SUM
    with pytest.raises(TargetError, match="saturate on CPUs without VNNI"):
        check_pairs(made.recipe, find_target("ort-cpu"), Method())
    assert recipe_as_asked(tmp_path, CompileConfig(method=Method(cpus="vnni")))


def test_it_is_taken_as_it_is_by_whoever_serves_with_vnni(for_vnni: Path, tmp_path: Path) -> None:
    done = compiled(for_vnni, tmp_path / "out", "ort-cpu", Method(cpus="vnni"))

    kept = load_recipe(done.bundle.root)
    assert max(layer.largest_pair for layer in kept.layers) > PAIR_SUM
    assert "tfmq/selftest.npz" in done.bundle.manifest.files
