"""tfmq-triton and --triton as a user types them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from standins.plan_file import write_plan
from standins.small_bundle import Parts, small_bundle
from standins.triton_schema import parse_config
from typer.testing import CliRunner, Result

from tfmq_export.cli.export import export
from tfmq_export.cli.triton import triton


def run(command: Callable[..., None], *words: object) -> Result:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def test_a_bundle_made_yesterday_becomes_a_model_and_then_its_next_version(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "yesterday").root
    options = [
        "-o",
        tmp_path / "models",
        "--instances",
        "2",
        "--threads",
        "3",
        "--max-batch",
        "4",
        "--queue-delay",
        "90",
    ]

    first, second = (run(triton, bundle, *options) for _ in range(2))

    assert (first.exit_code, second.exit_code) == (0, 0), first.output + second.output
    assert "yesterday, version 1, batches of up to 4" in " ".join(first.output.split())
    assert "version 2" in second.output
    config = parse_config(tmp_path / "models/yesterday/config.pbtxt")
    assert config.dynamic_batching.max_queue_delay_microseconds == 90
    assert config.instance_group[0].count == 2


def test_engines_are_given_for_all_gpus_or_for_each(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out", Parts(target="tensorrt")).root
    engine = write_plan(tmp_path / "l4.engine")
    common = [bundle, "-o", tmp_path / "models", "--gpu", "0", "--gpu", "1"]

    each = run(triton, *common, "--name", "each", "--engine", f"8.9={engine}", "--engine", f"8.0={engine}")
    every = run(triton, *common, "--name", "every", "--engine", engine)

    assert (each.exit_code, every.exit_code) == (0, 0), each.output + every.output
    config = parse_config(tmp_path / "models/each/config.pbtxt")
    assert set(config.cc_model_filenames) == {"8.0", "8.9"}
    assert list(config.instance_group[0].gpus) == [0, 1]
    assert parse_config(tmp_path / "models/every/config.pbtxt").default_model_filename == "model.plan"
    twice = run(triton, *common, "--name", "twice", "--engine", f"8.9={engine}", "--engine", f"8.9={engine}")
    assert "two engines for 8.9" in twice.output


def test_a_second_time_without_options_keeps_what_the_first_chose(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "small").root
    words = [bundle, "-o", tmp_path / "models"]
    chosen = "--max-batch 4 --instances 2 --threads 3 --queue-delay 90 --keep-versions 5"
    run(triton, *words, *chosen.split())
    before = (tmp_path / "models/small/config.pbtxt").read_text()

    again = run(triton, *words)
    other = run(triton, *words, "--threads", 1)

    assert (again.exit_code, other.exit_code) == (0, 0), again.output + other.output
    assert f"kept from its earlier versions: {chosen}" in " ".join(again.output.split())
    assert (tmp_path / "models/small/config.pbtxt").read_text() == before.replace('"3"', '"1"')


def test_a_text_file_is_no_engine(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out", Parts(target="tensorrt")).root
    (tmp_path / "hello.txt").write_text("hello, this is a text file")

    done = run(triton, bundle, "-o", tmp_path / "models", "--engine", f"8.9={tmp_path / 'hello.txt'}")

    assert done.exit_code == 2
    assert "begins with b'hell', where a plan of TensorRT begins with b'ftrt'" in done.output
    assert done.output.count("\n") == 1
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--target", "tensorrt-rtx", "--triton", "m"], "no backend for its engines"),
        (["--target", "tensorrt", "--triton", "m"], "--engine"),
        (["--triton", "a/b"], "as for a folder"),
    ],
)
def test_compiling_for_no_backend_is_refused_before_it_begins(words: list[str], says: str, tmp_path: Path) -> None:
    done = run(export, tmp_path / "none.pt", "-o", tmp_path / "out", "-q", *words)

    assert done.exit_code == 2
    assert says in done.output
    assert done.output.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
