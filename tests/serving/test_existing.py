"""What a model keeps when a newer version joins it: read by Triton's own schema before and after."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from standins.plan_file import write_plan
from standins.small_bundle import Parts, small_bundle
from standins.triton_schema import kind_name, parse_config

from tfmq_export.errors import ConfigError
from tfmq_export.serving.options import Serving
from tfmq_export.serving.repository import ServedModel, write_repository

CHOSEN: dict[str, Any] = {
    "max_batch": 6,
    "instances": 2,
    "threads": 3,
    "queue_delay_us": 250,
    "keep_versions": 3,
}
OTHER: dict[str, Any] = {"max_batch": 12, "instances": 4, "threads": 1, "queue_delay_us": 0, "keep_versions": 5}


PLAIN = Parts()


def settings_of(path: Path) -> dict[str, Any]:
    """What a server would do, by the name of what sets it."""
    config = parse_config(path)
    (group,) = config.instance_group
    return {
        "max_batch": config.max_batch_size,
        "instances": group.count,
        "threads": int(config.parameters["intra_op_thread_count"].string_value or 0),
        "gpus": tuple(group.gpus),
        "queue_delay_us": config.dynamic_batching.max_queue_delay_microseconds,
        "keep_versions": config.version_policy.latest.num_versions,
    }


@pytest.fixture
def add(tmp_path: Path) -> Callable[..., ServedModel]:
    """Add one more version of ``small``; says where it is."""

    def write(parts: Parts = PLAIN, **asked: Any) -> ServedModel:
        number = len(list(tmp_path.iterdir()))
        bundle = small_bundle(tmp_path / f"bundle-{number}", parts, fingerprint=f"{number}" * 64)
        return write_repository(bundle, tmp_path / "repo", Serving("small", **asked))[0]

    return write


def edit(model: ServedModel, old: str, new: str) -> None:
    path = model.folder / "config.pbtxt"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_second_version_keeps_all_settings_of_the_first(add: Callable[..., ServedModel]) -> None:
    add(**CHOSEN)

    second = add()

    assert second.version == 2
    assert settings_of(second.folder / "config.pbtxt") == {**CHOSEN, "gpus": ()}
    assert list(parse_config(second.folder / "config.pbtxt").dynamic_batching.preferred_batch_size) == [2, 4, 6]
    assert second.kept == (
        "--max-batch 6",
        "--instances 2",
        "--threads 3",
        "--queue-delay 250",
        "--keep-versions 3",
    )


def test_usual_settings_are_kept_in_silence(add: Callable[..., ServedModel]) -> None:
    first = add()
    before = settings_of(first.folder / "config.pbtxt")

    second = add()

    assert settings_of(second.folder / "config.pbtxt") == before
    assert (first.kept, second.kept) == ((), ())


@pytest.mark.parametrize("name", OTHER)
def test_what_is_given_again_wins_and_the_rest_stays(name: str, add: Callable[..., ServedModel]) -> None:
    add(**CHOSEN)

    second = add(**{name: OTHER[name]})

    assert settings_of(second.folder / "config.pbtxt") == {**CHOSEN, "gpus": (), name: OTHER[name]}


@pytest.mark.parametrize(("asked", "then"), [({}, (0, 2)), ({"gpus": (1,)}, (1,)), ({"gpus": ()}, ())])
def test_gpus_are_kept_or_chosen_again(asked: dict[str, Any], then: Any, add: Callable[..., ServedModel]) -> None:
    cuda = Parts(target="ort-cuda")
    add(cuda, gpus=(0, 2), instances=2)

    second = add(cuda, **asked)

    assert settings_of(second.folder / "config.pbtxt")["gpus"] == then
    assert settings_of(second.folder / "config.pbtxt")["instances"] == 2


def test_engines_are_the_new_versions_own(add: Callable[..., ServedModel], tmp_path: Path) -> None:
    engines = tmp_path / "engines"
    engines.mkdir()
    plan = write_plan(engines / "model.plan")
    add(Parts(target="tensorrt"), engines={"8.9": plan}, instances=2, gpus=(1,))

    second = add(Parts(target="tensorrt"), engines={"8.9": plan, "8.0": plan})

    assert set(parse_config(second.folder / "config.pbtxt").cc_model_filenames) == {"8.0", "8.9"}
    assert settings_of(second.folder / "config.pbtxt")["gpus"] == (1,)


def test_a_prologue_keeps_its_own_settings(add: Callable[..., ServedModel]) -> None:
    first = add(Parts(prologue="vector"), instances=2, threads=2)
    prologue = first.folder.with_name("small_prologue") / "config.pbtxt"
    prologue.write_text(prologue.read_text().replace("count: 2", "count: 1"))

    add(Parts(prologue="vector"), max_batch=4)

    found, denoiser = settings_of(prologue), settings_of(first.folder / "config.pbtxt")
    assert (found["instances"], denoiser["instances"]) == (1, 2)
    assert (found["max_batch"], denoiser["max_batch"]) == (4, 4)


def test_what_the_graph_decides_is_no_setting(add: Callable[..., ServedModel]) -> None:
    add(Parts(single=True), queue_delay_us=90)

    second = add(Parts(single=True))

    assert (second.max_batch, second.kept) == (1, ())


def test_a_largest_batch_of_one_ends_the_waiting(add: Callable[..., ServedModel]) -> None:
    add(queue_delay_us=90)

    one = add(max_batch=1)
    config = parse_config(one.folder / "config.pbtxt")
    more = add(max_batch=4)

    assert not config.HasField("dynamic_batching")
    assert settings_of(more.folder / "config.pbtxt")["queue_delay_us"] == 500  # nothing was left to keep


def test_what_was_added_by_hand_stays(add: Callable[..., ServedModel]) -> None:
    first = add(max_batch=6)
    path = first.folder / "config.pbtxt"
    path.write_text(
        path.read_text()
        .replace("  kind: KIND_CPU\n", "  kind: KIND_CPU\n  rate_limiter { resources [ { name: 'R1' count: 4 } ] }\n")
        .replace("preferred_batch_size: [ 2, 4, 6 ]", "preferred_batch_size: 3; preserve_ordering: true")
        + "# Ours:\n"
        + 'parameters: [ { key: "enable_mem_arena", value: { string_value: "0" } } ]\n'
        + "metric_tags { key: 'team' value: 'im' 'ages' }\n"
        + "response_cache < enable: true >\n"
        + "optimization { priority: PRIORITY_MAX eager_batching: true }\n"
    )
    parse_config(path)  # it is right in the eyes of the schema

    second = add()

    config = parse_config(second.folder / "config.pbtxt")
    assert config.instance_group[0].rate_limiter.resources[0].count == 4
    assert kind_name(config.instance_group[0].kind) == "KIND_CPU"
    assert list(config.dynamic_batching.preferred_batch_size) == [3]
    assert config.dynamic_batching.preserve_ordering
    assert config.parameters["enable_mem_arena"].string_value == "0"
    assert config.metric_tags["team"] == "images"
    assert config.response_cache.enable
    assert config.optimization.eager_batching
    # What describes the bundle is the new one's.
    assert config.parameters["tfmq.fingerprint"].string_value != "1" * 64
    assert config.metric_tags["fingerprint"] == config.parameters["tfmq.fingerprint"].string_value[:12]
    assert config.parameters["tfmq.timesteps"].string_value == "750 500 250 0"


def test_no_preferred_batch_stays_none(add: Callable[..., ServedModel]) -> None:
    first = add(max_batch=6)
    edit(first, "preferred_batch_size: [ 2, 4, 6 ]", "")

    second = add(queue_delay_us=0)

    assert list(parse_config(second.folder / "config.pbtxt").dynamic_batching.preferred_batch_size) == []


def test_batches_that_are_preferred_follow_another_largest_one(add: Callable[..., ServedModel]) -> None:
    first = add(max_batch=6)
    edit(first, "preferred_batch_size: [ 2, 4, 6 ]", "preferred_batch_size: [ 3 ]")

    second = add(max_batch=4)

    assert list(parse_config(second.folder / "config.pbtxt").dynamic_batching.preferred_batch_size) == [2, 4]


GROUP = "instance_group {\n  count: 2\n  kind: KIND_CPU\n}"
UNREADABLE = {
    "in the middle of a text": (lambda text: text[: text.index('"') + 3], "name", "cannot be kept; mend it"),
    "in the middle of a message": (lambda text: text[: text.index("}")], "name", "it ends too early.*mend it"),
    "empty": (lambda text: "", "name", "it is empty.*mend it"),
    "not text format": (lambda text: text + "{", "name", r"line \d+: '\{' is not expected.*mend it"),
    "no group": (lambda text: text.replace(GROUP, ""), "instances", "instance_group is not as .*give --instances"),
    "two groups": (lambda text: text + GROUP, "instances", "instance_group is not as tfmq-triton .*give --instances"),
    "words": (lambda text: text.replace("count: 2", "count: two"), "instances", "count is not .*give --instances"),
    "no batch": (lambda text: text.replace("max_batch_size: 6", ""), "max_batch", "max_batch_size .*give --max-batch"),
    "twice": (lambda text: text + "max_batch_size: 2", "max_batch", "max_batch_size .*give --max-batch"),
    "threads": (lambda text: text.replace('"3"', '"all"'), "threads", "intra_op_thread_count .*give --threads"),
    "policy": (lambda text: text.replace("latest", "specific"), "keep_versions", ".*give --keep-versions"),
    "not batching": (
        lambda text: text.replace("dynamic_batching", "sequence_batching"),
        "queue_delay_us",
        "dynamic_batching is not as .*give --queue-delay",
    ),
    "the same GPU twice": (
        lambda text: text.replace("kind: KIND_CPU", "kind: KIND_CPU gpus: [ 1, 1 ]"),
        "gpus",
        "gpus is not as .*give --gpu",
    ),
}
"""A change of the file, what cannot be kept then, and what is said."""


@pytest.mark.parametrize("how", UNREADABLE)
def test_what_cannot_be_read_is_refused_and_not_reset(how: str, add: Callable[..., ServedModel]) -> None:
    change, _, says = UNREADABLE[how]
    first = add(**CHOSEN)
    path = first.folder / "config.pbtxt"
    path.write_text(change(path.read_text()))
    before = path.read_text()

    with pytest.raises(ConfigError, match=says) as refused:
        add()

    assert str(refused.value).startswith(f"{path}: ")
    assert path.read_text() == before
    assert {each.name for each in first.folder.iterdir()} == {"1", "config.pbtxt", "warmup"}


@pytest.mark.parametrize("how", [how for how, (_, name, _) in UNREADABLE.items() if name != "name"])
def test_what_cannot_be_read_may_be_given(how: str, add: Callable[..., ServedModel]) -> None:
    change, name, _ = UNREADABLE[how]
    first = add(**CHOSEN)
    path = first.folder / "config.pbtxt"
    path.write_text(change(path.read_text()))
    asked = {**OTHER, "gpus": ()}
    asked = {each: asked[each] for each in ({name, "gpus"} if name == "instances" else {name})}

    second = add(**asked)

    assert settings_of(second.folder / "config.pbtxt")[name] == asked[name]
    for other in CHOSEN.keys() - asked.keys():
        assert settings_of(second.folder / "config.pbtxt")[other] == CHOSEN[other]


def test_settings_that_do_not_fit_together_are_refused(add: Callable[..., ServedModel]) -> None:
    first = add(instances=2, threads=3)

    with pytest.raises(ConfigError, match="2 instances with all cores each"):
        add(threads=0)

    assert settings_of(first.folder / "config.pbtxt")["threads"] == 3


def test_where_no_version_is_left_other_hardware_starts_anew(add: Callable[..., ServedModel]) -> None:
    first = add(threads=3, instances=2)
    (first.folder / "1").rename(first.folder.parent.parent / "gone")

    again = add(Parts(target="ort-cuda"))

    assert settings_of(again.folder / "config.pbtxt")["instances"] == 1
    assert again.kept == ()
