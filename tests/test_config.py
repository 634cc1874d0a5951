from pathlib import Path

import pytest
from pydantic import ValidationError

from tfmq_export.config import FLOORS, LOWEST, PRESETS, CompileConfig, Thresholds, find_preset, load_config
from tfmq_export.errors import ConfigError


def toml(folder: Path, text: str) -> Path:
    path = folder / "tfmq.toml"
    path.write_text(text)
    return path


def test_without_file_and_flags_the_defaults_hold() -> None:
    assert load_config(None, {}) == CompileConfig()


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = toml(tmp_path, 'preset = "w4a8"\nseed = 3\n[thresholds]\npsnr = 20.0\nssim = 0.5\n')

    config = load_config(path, {"seed": 5, "thresholds.ssim": 0.9, "preset": None, "thresholds.psnr": None})

    assert (config.preset, config.seed, config.target) == ("w4a8", 5, "ort-cpu")
    assert (config.thresholds.psnr, config.thresholds.ssim) == (20.0, 0.9)
    assert config.thresholds.agreement == CompileConfig().thresholds.agreement


def test_flags_of_the_method_win_over_its_table(tmp_path: Path) -> None:
    path = toml(tmp_path, 'max_memory = "2GiB"\n[method]\nles = "off"\npts = "mse"\nreconstruct = false\n')

    config = load_config(path, {"method.les": "smoothquant", "method.pts": None, "effort": "fast"})

    assert (config.method.les, config.method.pts, config.method.reconstruct) == ("smoothquant", "mse", False)
    assert config.method.tib == CompileConfig().method.tib
    assert (config.effort, config.max_memory) == ("fast", 2 << 30)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed = 1", "unknown setting 'sed'; did you mean 'seed'?"),
        ("calibration_image = 1", "unknown setting 'calibration_image'; did you mean 'calibration_images'?"),
        ("[thresholds]\npsn = 1.0", "psn'; did you mean 'thresholds.psnr'?"),
        ('les = "off"', "unknown setting 'les'; did you mean 'method.les'?"),
        ("min_psnr = 30", "unknown setting 'min_psnr'; did you mean 'thresholds.psnr'?"),
        ("max_lpips = 0.1", "unknown setting 'max_lpips'; did you mean 'thresholds.lpips'?"),
        ("steps = 25", "unknown setting 'steps'; it belongs to one run: give it as --steps"),
        ("guidance_scale = 2", "give it as --guidance-scale"),
        ("zzzzzz = 1", "unknown setting 'zzzzzz'"),
        ('preset = "w8a9"', "unknown preset 'w8a9'; did you mean 'w8a8'?"),
        ('preset = "int4"', "unknown preset 'int4'; there is w8a8, w4a8, w4a6, w8a16, w4a16, fp32"),
        ('preset = "w3a3"', "unknown preset 'w3a3'; there is w8a8"),
        ("seed = -1", "seed: Input should be greater than or equal to 0, got -1"),
        ("calibration_images = 0", "calibration_images: "),
        ('seed = "many"', "seed: "),
        ('[method]\nestimator = "median"', "estimator: "),
        ("[method]\nestimatr = 1", "estimatr'; did you mean 'method.estimator'?"),
        ("[method]\npts_quorum = 1.5", "pts_quorum: "),
        ('effort = "heroic"', "effort: "),
        ('pts_lowering = "unfold"', "pts_lowering: "),
        ('tables = "int4"', "tables: "),
        ('max_memory = "1KiB"', "max_memory: "),
        ("seed = ", "not readable TOML"),
        ('[layers."*.conv"]\nweigths = 8', "[layers.\"*.conv\"]: unknown setting 'weigths'; did you mean 'weights'?"),
        ('[layers."*.conv"]\nzzz = 8', "unknown setting 'zzz'; there is weights, inputs"),
        ('[layers."*.conv"]\nweights = 5', "[layers.\"*.conv\"] weights: Input should be 4, 8 or 'float', got 5"),
        ('[layers."*"]\nweights = "float"\ninputs = 8', "in floating point; leave out inputs = 8"),
        ('[layers]\n"*.conv" = 8', '[layers."*.conv"]: '),
        ("layers = 8", "layers: "),
        pytest.param("thresholds = 5", "thresholds: "),
        pytest.param("method = 5", "method: "),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(toml(tmp_path, text), {})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_names_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, "sed = 1")

    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    assert str(caught.value).startswith(f"{path}: ")


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tfmq.toml"
    path.write_bytes(b"\xff\xfe")

    with pytest.raises(ConfigError, match="not readable TOML"):
        load_config(path, {})
    with pytest.raises(ConfigError, match=r"none\.toml: No such file or directory$"):
        load_config(tmp_path / "none.toml", {})


def test_a_flag_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="calibration_images: "):
        load_config(None, {"calibration_images": 0})


@pytest.mark.parametrize(("name", "nearest"), [("w8a9", "w8a8"), ("w4a7", "w4a"), ("fp16", "fp32"), ("W8A8", "w8a8")])
def test_an_unknown_preset_suggests_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_preset(name)
    assert f"unknown preset {name!r}; " in str(caught.value)
    assert nearest in str(caught.value)


def test_a_preset_like_no_other_lists_them_all() -> None:
    with pytest.raises(ConfigError, match=f"there is {', '.join(PRESETS)}"):
        find_preset("qqqqqq")


def test_every_preset_is_usable() -> None:
    for name, preset in PRESETS.items():
        assert CompileConfig(preset=name).preset == name
        assert (preset.weight_bits == 0) == (preset.activation_bits == 0) == (name == "fp32")


def test_a_config_cannot_be_edited() -> None:
    with pytest.raises(ValidationError):
        CompileConfig().seed = 1


def test_every_preset_has_floors_of_its_own_and_fewer_bits_have_lower_ones() -> None:
    nothing_asked = Thresholds()

    assert FLOORS.keys() == PRESETS.keys()
    floors = [(nothing_asked.psnr_of(name), nothing_asked.sqnr_of(name)) for name in ("fp32", "w8a8", "w4a8", "w4a6")]
    assert floors == sorted(floors, reverse=True)
    assert len(set(floors)) == len(floors)
    assert floors[1] == (FLOORS["w8a8"].psnr, FLOORS["w8a8"].sqnr)


@pytest.mark.parametrize("preset", [*PRESETS, "a preset of tomorrow"])
def test_a_number_that_was_given_wins_over_the_floor(preset: str) -> None:
    lax, strict = Thresholds(psnr=-100, sqnr=0), Thresholds(psnr=200)

    assert (lax.psnr_of(preset), lax.sqnr_of(preset)) == (-100, 0)  # 0 is a number
    assert strict.psnr_of(preset) == 200
    assert strict.sqnr_of(preset) == Thresholds().sqnr_of(preset)


def test_a_preset_that_is_not_known_has_the_lowest_floors() -> None:
    found = Thresholds().psnr_of("w2a2"), Thresholds().sqnr_of("w2a2")

    assert found == (LOWEST.psnr, LOWEST.sqnr)
    assert all(found < (floors.psnr, floors.sqnr) for floors in FLOORS.values())


def test_thresholds_come_from_file_and_flags(tmp_path: Path) -> None:
    path = toml(tmp_path, "[thresholds]\nsqnr = 3.5\nkernels = 20.0\n")

    thresholds = load_config(path, {"thresholds.psnr": 0.0}).thresholds

    assert (thresholds.psnr_of("w8a8"), thresholds.sqnr_of("w8a8"), thresholds.kernels) == (0.0, 3.5, 20.0)


@pytest.mark.parametrize("text", ["[thresholds]\nsqnr = nan\n", "[thresholds]\nkernels = inf\n"])
def test_a_threshold_that_is_no_number_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="finite number"):
        load_config(toml(tmp_path, text), {})


def test_layers_are_pinned_by_pattern_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, '[layers."*"]\nweights = 4\n[layers."*.conv"]\nweights = 8\ninputs = "float"\n')

    layers = load_config(path, {}).layers

    assert list(layers) == ["*", "*.conv"]
    assert (layers["*"].weights, layers["*"].inputs) == (4, None)
    assert (layers["*.conv"].weights, layers["*.conv"].inputs) == (8, "float")
