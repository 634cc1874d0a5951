import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nets.handwritten import denoiser_of

from tfmq_export.capture.dependences import Operation
from tfmq_export.capture.program import capture
from tfmq_export.config import Method
from tfmq_export.errors import ConfigError, OutputError
from tfmq_export.ptq.equivalent_scaling import ScalingSchedule
from tfmq_export.ptq.fake_quant import Grid
from tfmq_export.ptq.walk.calibrated_model import CalibratedModel, QuantPlan, prepare
from tfmq_export.ptq.walk.calibration import calibrate
from tfmq_export.ptq.walk.checkpoint import Checkpoint
from tfmq_export.ptq.walk.draft import Draft
from tfmq_export.ptq.walk.effort import Effort, RoundingSchedule, find_effort
from tfmq_export.ptq.walk.quantize import quantize
from tfmq_export.recipe.grid import QParams, QuantSpec
from tfmq_export.recipe.recipe import LayerRecipe, QuantRecipe

SETTINGS = {"preset": "w4a8", "seed": "0"}
EFFORT: Effort = replace(
    find_effort("fast", 8),
    rows_per_timestep=4,
    scaling=ScalingSchedule(6, 4, 1e-2),
    rounding=RoundingSchedule(10, 4, 1e-2),
    step_iterations=4,
)
PLAN = QuantPlan("test", 4, 8, Method(), EFFORT, frozenset({"conv"}))
NETS = ("film_unet", "dit", "edm")


class InterruptedRunError(Exception):
    """Somebody pressed Ctrl-C."""


def silent(done: int, total: int) -> None:
    pass


@functools.cache
def subject_of(name: str) -> CalibratedModel:
    """One capture for all runs."""
    denoiser = denoiser_of(name)
    recorded = calibrate(denoiser, images=4, seed=0, progress=silent)
    return prepare(capture(denoiser), denoiser, recorded, PLAN, {"made": "here"})


@dataclass
class Interrupt:
    """A progress callback that lets ``blocks`` blocks finish, then gives up in the middle of the next."""

    folder: Path
    blocks: int

    def __call__(self, done: int, total: int) -> None:
        if len(list(self.folder.glob("block-*.safetensors"))) >= self.blocks:
            raise InterruptedRunError


def arrays_of(recipe: QuantRecipe) -> dict[str, bytes]:
    """Every array of a recipe, to the last bit."""
    found: dict[str, bytes] = {}
    for layer in recipe.layers:
        found |= {f"{layer.name}.{key}": value for key, value in _arrays(layer).items()}
    for table in recipe.tib.tables:
        found[f"table.{table.name}"] = table.rows.tobytes()
    return found


def _arrays(layer: LayerRecipe) -> dict[str, bytes]:
    values: dict[str, object] = {"codes": layer.weight_codes, "les": layer.les_scale, "pts": layer.pts_exponent}
    grids = {"weight": layer.weight, "input": layer.input, "output": layer.output}
    grids |= {"input_t": layer.input_by_timestep, "output_t": layer.output_by_timestep}
    for role, grid in grids.items():
        if grid is not None:
            values |= {f"{role}.scale": grid.scale, f"{role}.zero_point": grid.zero_point}
    return {key: np.asarray(value).tobytes() for key, value in values.items() if value is not None}


def made(name: str, plan: QuantPlan = PLAN, checkpoint: Checkpoint | None = None) -> dict[str, bytes]:
    return arrays_of(quantize(subject_of(name), plan, silent, checkpoint))


@functools.cache
def uninterrupted(name: str) -> dict[str, bytes]:
    return made(name)


# -- the folder -----------------------------------------------------------------------------------


def undecided_draft(name: str, output: bool) -> Draft:
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    op = Operation(name, f"net.{name}", "conv", "x", f"{name}.weight", None, 100, frozenset({"sample"}))
    grid = QuantSpec(8, signed=False)
    return Draft(op, weight, QuantSpec(4, axis=0), grid, grid if output else None)


def decided(draft: Draft, *, tau: bool, timesteps: int) -> Draft:
    generator = torch.Generator().manual_seed(1)
    shape = (timesteps,) if timesteps else ()
    grid = Grid(draft.input_spec, torch.rand(shape, generator=generator) + 0.1, torch.full(shape, 3.0))
    return replace(
        draft,
        tau=torch.rand(3, generator=generator) + 0.5 if tau else None,
        exponent=torch.tensor([0, -3, -1], dtype=torch.int8) if tau else None,
        scale=torch.rand(5, generator=generator) + 0.1,
        codes=torch.randint(-8, 8, draft.plain.shape, generator=generator).float(),
        input=grid,
        output=grid if draft.output_spec is not None else None,
    )


def same(first: Draft, second: Draft) -> bool:
    """The same recipe: what is kept is what ends in it."""
    left, right = _arrays(first.to_recipe()), _arrays(second.to_recipe())
    return left == right


@pytest.mark.parametrize("tau", [False, True])
@pytest.mark.parametrize("timesteps", [0, 4])
def test_finished_drafts_come_back_as_they_were(tmp_path: Path, tau: bool, timesteps: int) -> None:
    plain = [undecided_draft("a", True), undecided_draft("b", False)]
    finished = [decided(draft, tau=tau, timesteps=timesteps) for draft in plain]

    Checkpoint(tmp_path / "kept", SETTINGS, resume=False).save("block-0000", finished)
    found = Checkpoint(tmp_path / "kept", SETTINGS, resume=True).load("block-0000", plain)

    assert found is not None
    assert [draft.op for draft in found] == [draft.op for draft in plain]
    assert all(same(before, after) for before, after in zip(finished, found, strict=True))
    for before, after in zip(finished, found, strict=True):
        assert (before.tau is None) == (after.tau is None)
        assert (before.exponent is None) == (after.exponent is None)
        assert torch.equal(before.rounded, after.rounded)
        assert after.input is not None
        assert before.input is not None
        assert after.input.spec == before.input.spec
        assert after.input.zero_point.dtype == before.input.zero_point.dtype


def test_layers_that_share_a_tensor_are_kept(tmp_path: Path) -> None:
    first = decided(undecided_draft("a", False), tau=True, timesteps=0)
    both = [first, replace(first, op=replace(first.op, name="b"))]
    checkpoint = Checkpoint(tmp_path / "kept", SETTINGS, resume=False)

    checkpoint.save("block-0000", both)

    plain = [undecided_draft("a", False), undecided_draft("b", False)]
    found = checkpoint.load("block-0000", plain)
    assert found is not None
    assert found[1].tau is not None
    assert torch.equal(found[1].tau, first.tau)


def test_a_block_without_layers_can_be_kept(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "kept", SETTINGS, resume=False)

    checkpoint.save("block-0000", [])

    assert checkpoint.load("block-0000", []) == ()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_counts_as_not_there(tmp_path: Path, share: float) -> None:
    plain = [undecided_draft("a", True)]
    checkpoint = Checkpoint(tmp_path / "kept", SETTINGS, resume=False)
    checkpoint.save("block-0000", [decided(plain[0], tau=True, timesteps=4)])
    (file,) = (tmp_path / "kept").glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])

    assert checkpoint.load("block-0000", plain) is None
    file.write_bytes(content)
    assert checkpoint.load("block-0000", plain) is not None


def test_missing_blocks_and_blocks_of_other_layers_count_as_not_there(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "kept", SETTINGS, resume=False)
    checkpoint.save("block-0000", [decided(undecided_draft("a", True), tau=False, timesteps=0)])

    assert checkpoint.load("block-0001", [undecided_draft("a", True)]) is None
    assert checkpoint.load("block-0000", [undecided_draft("b", True)]) is None


def test_a_write_that_was_cut_short_leaves_no_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [undecided_draft("a", True)]
    checkpoint = Checkpoint(tmp_path / "kept", SETTINGS, resume=False)

    def killed(arrays: object, path: Path) -> None:
        path.write_bytes(b"half of a ")
        raise InterruptedRunError

    monkeypatch.setattr("tfmq_export.ptq.walk.checkpoint.save_file", killed)
    with pytest.raises(InterruptedRunError):
        checkpoint.save("block-0000", [decided(plain[0], tau=False, timesteps=0)])

    assert checkpoint.load("block-0000", plain) is None
    assert not list((tmp_path / "kept").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"preset": "w8a8", "seed": "0"}, "preset w4a8"),
        ({"preset": "w4a8", "seed": "1"}, "seed 0"),
        ({"preset": "w4a8"}, "seed 0"),
        ({"preset": "w4a8", "seed": "0", "effort": "paper"}, "effort None"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, other: dict[str, str], named: str) -> None:
    Checkpoint(tmp_path / "kept", SETTINGS, resume=False)

    with pytest.raises(ConfigError, match=f"{named}.*without --resume"):
        Checkpoint(tmp_path / "kept", other, resume=True)

    Checkpoint(tmp_path / "kept", SETTINGS, resume=True)  # the same in any order
    Checkpoint(tmp_path / "kept", dict(reversed(SETTINGS.items())), resume=True)


def test_starting_afresh_forgets_the_blocks_and_the_settings(tmp_path: Path) -> None:
    plain = [undecided_draft("a", True)]
    Checkpoint(tmp_path / "kept", SETTINGS, resume=False).save(
        "block-0000", [decided(plain[0], tau=False, timesteps=0)]
    )

    afresh = Checkpoint(tmp_path / "kept", {"preset": "w8a8"}, resume=False)

    assert afresh.load("block-0000", plain) is None
    assert json.loads((tmp_path / "kept" / "settings.json").read_text()) == {"preset": "w8a8"}


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_run_that_breaks_leaves_its_folder_only_if_there_is_something_to_resume(tmp_path: Path, blocks: int) -> None:
    finished = decided(undecided_draft("a", True), tau=False, timesteps=0)

    def broken() -> None:
        with Checkpoint(tmp_path / "kept", SETTINGS, resume=False) as checkpoint:
            for index in range(blocks):
                checkpoint.save(f"block-{index:04d}", [finished])
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        broken()

    assert (tmp_path / "kept").exists() == (blocks > 0)


def test_a_folder_that_cannot_be_made_and_settings_that_cannot_be_read_are_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="choose another -o"):
        Checkpoint(tmp_path / "file" / "kept", SETTINGS, resume=True)

    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "settings.json").write_text('{"preset": ')
    with pytest.raises(ConfigError, match="start again without --resume"):
        Checkpoint(tmp_path / "kept", SETTINGS, resume=True)


# -- the whole run --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_resumed_run_makes_the_recipe_of_an_uninterrupted_one(tmp_path: Path, name: str, blocks: int) -> None:
    folder = tmp_path / "kept"
    with pytest.raises(InterruptedRunError):
        quantize(subject_of(name), PLAN, Interrupt(folder, blocks), Checkpoint(folder, SETTINGS, resume=False))
    kept = {file.name: file.stat().st_mtime_ns for file in folder.glob("block-*.safetensors")}
    assert len(kept) == blocks

    resumed = made(name, checkpoint=Checkpoint(folder, SETTINGS, resume=True))

    assert resumed == uninterrupted(name)
    assert all((folder / file).stat().st_mtime_ns == written for file, written in kept.items())  # not made again


def test_a_truncated_block_is_made_again_with_the_same_result(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    made("edm", checkpoint=Checkpoint(folder, SETTINGS, resume=False))
    damaged = folder / "block-0002.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])

    resumed = made("edm", checkpoint=Checkpoint(folder, SETTINGS, resume=True))

    assert resumed == uninterrupted("edm")
    assert damaged.read_bytes() == whole


def test_what_is_kept_is_used(tmp_path: Path) -> None:
    # Without this test the ones above would pass if every block were computed again.
    folder, subject = tmp_path / "kept", subject_of("edm")
    checkpoint = Checkpoint(folder, SETTINGS, resume=False)
    quantize(subject, PLAN, silent, checkpoint)
    calls: list[int] = []

    quantize(subject, PLAN, lambda done, total: calls.append(done), checkpoint)

    assert len(calls) == len(list(folder.glob("block-*.safetensors")))  # one report for each, none from inside


@pytest.mark.parametrize("name", NETS)
def test_one_seed_gives_one_recipe_and_another_seed_another(name: str) -> None:
    again, other = made(name), made(name, replace(PLAN, seed=1))

    assert again == uninterrupted(name)
    assert other.keys() == again.keys()
    assert any(other[key] != again[key] for key in again if key.endswith(".codes"))
    assert any(other[key] != again[key] for key in again if key.endswith(".les"))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("ceiling", [2, 1 << 14])
def test_a_ceiling_on_memory_changes_no_bit(name: str, ceiling: int) -> None:
    assert made(name, replace(PLAN, max_memory=ceiling)) == uninterrupted(name)


@pytest.mark.parametrize("tib", ["quantized", "select"])
@pytest.mark.parametrize("tiar", [True, False])
def test_a_quantized_temporal_block_is_resumed_too(tmp_path: Path, tib: str, tiar: bool) -> None:
    schedule = RoundingSchedule(10, 0, 1e-2)
    plan = replace(PLAN, method=Method(tib=tib, tiar=tiar), effort=replace(EFFORT, temporal=schedule))
    folder = tmp_path / "kept"
    whole = made("dit", plan)
    with pytest.raises(InterruptedRunError):
        quantize(subject_of("dit"), plan, Interrupt(folder, 2), Checkpoint(folder, SETTINGS, resume=False))

    resumed = made("dit", plan, Checkpoint(folder, SETTINGS, resume=True))

    assert resumed == whole
    assert (folder / "temporal.safetensors").exists() == tiar
    tables = [key for key in whole if key.startswith("table.")]
    assert any(whole[key] != uninterrupted("dit")[key] for key in tables)  # the exact tables were not simply served


def test_grids_of_a_recipe_are_positive_and_codes_are_integers() -> None:
    recipe = quantize(subject_of("edm"), PLAN, silent)

    assert {split.name for split in recipe.splits} == {"leave"}
    assert [layer.name for layer in recipe.layers] == [op.name for op in subject_of("edm").program.operations]
    for layer in recipe.layers:
        assert isinstance(layer.input, QParams)
        assert (layer.weight.scale > 0).all()
        assert layer.weight_codes.dtype == np.int8
