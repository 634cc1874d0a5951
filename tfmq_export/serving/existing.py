"""What a model keeps when a newer version joins it, read back from its ``config.pbtxt``.

What describes a bundle, such as tensors, files and the warm-up, is written anew. Settings that are not asked for
again stay, and so does whatever a user added by hand. What cannot be understood is refused, never reset in silence.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfmq_export.errors import ConfigError
from tfmq_export.serving.options import Serving
from tfmq_export.serving.pbtxt import Message, Value, map_entries, parse, repeated
from tfmq_export.serving.triton_config import DESCRIBED, THREADS

ANEW = frozenset(
    {
        *("name", "platform", "backend", "max_batch_size", "default_model_filename", "cc_model_filenames"),
        *("input", "output", "version_policy", "model_warmup", "sequence_batching", "ensemble_scheduling"),
        *("instance_group", "dynamic_batching", "metric_tags", "parameters"),
    }
)
"""Fields that are written anew; those of the last line keep what a user added to them."""
QUEUE_DELAY = "max_queue_delay_microseconds"
OPTIONS: Mapping[str, str] = {
    "max_batch": "--max-batch",
    "instances": "--instances",
    "threads": "--threads",
    "gpus": "--gpu",
    "queue_delay_us": "--queue-delay",
    "keep_versions": "--keep-versions",
}
"""What sets each of the settings on the command line."""


class _OtherwiseError(Exception):
    """A field is not as tfmq-triton writes it; the text is its name."""


@dataclass(frozen=True, slots=True)
class Existing:
    """The configuration of a model that is in a repository; of one that is not, nothing.

    Attributes:
        path: Of the file.
        message: Its fields.
    """

    path: Path
    message: Message

    @classmethod
    def read(cls, path: Path) -> "Existing":
        """Read a configuration, if it is there.

        Raises:
            ConfigError: it is there and cannot be read.
        """
        if not path.exists():
            return cls(path, {})
        try:
            message = parse(path.read_text("utf-8"))
            if not message:
                raise ValueError("it is empty")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path}: not a configuration that can be read ({error}), so its settings cannot be kept; "
                "mend it, or choose another --name"
            ) from error
        return cls(path, message)

    @property
    def target(self) -> str:
        """What the newest version was compiled for; empty where that is not known."""
        value = _entries(self.message, "parameters").get(f"{DESCRIBED}target")
        return str(value.get("string_value", "")) if isinstance(value, Mapping) else ""

    def kept(self, serving: Serving) -> dict[str, Any]:
        """Settings that were not asked for and that the model has, by name.

        Raises:
            ConfigError: one of them is not as tfmq-triton writes it.
        """
        if not self.message:
            return {}
        found = {name: self._setting(name) for name in OPTIONS if name not in serving.given}
        return {name: value for name, value in found.items() if value is not None}

    def _setting(self, setting: str) -> Any:
        """The model's own setting; None where it has none."""
        try:
            return _READERS[setting](self.message)
        except _OtherwiseError as error:
            option = OPTIONS[setting]
            raise ConfigError(
                f"{self.path}: {error} is not as tfmq-triton writes it, so {option} cannot be kept; give {option}"
            ) from error

    def joined(self, message: Message) -> Message:
        """A new version's configuration with what was added to the old one by hand."""
        old = self.message
        if not old:
            return message
        joined = {**message, **{name: value for name, value in old.items() if name not in ANEW}}
        if "dynamic_batching" in message:
            joined["dynamic_batching"] = _batching(message, old)
        joined["instance_group"] = [_with_own(message["instance_group"], old.get("instance_group"), {"count", "gpus"})]
        for name in ("parameters", "metric_tags"):
            kept = {x: y for x, y in _entries(old, name).items() if x != THREADS and not x.startswith(DESCRIBED)}
            joined[name] = map_entries({**kept, **_entries(message, name)})
        return joined


def _with_own(new: Value, old: Value | None, anew: Collection[str]) -> Value:
    """A part of the configuration with what was added to the old one by hand.

    Args:
        anew: Fields that are the new one's, also where it has none.
    """
    (new,), olds = repeated(new), repeated(old)
    if len(olds) != 1 or not isinstance(olds[0], Mapping) or not isinstance(new, Mapping):
        return new
    return {**new, **{name: value for name, value in olds[0].items() if name not in anew}}


def _batching(new: Message, old: Message) -> Value:
    """How requests are joined; the sizes that a user prefers stay as long as the largest does."""
    ours, theirs, preferred = new["dynamic_batching"], old.get("dynamic_batching"), "preferred_batch_size"
    if new["max_batch_size"] != old.get("max_batch_size"):
        return _with_own(ours, theirs, {QUEUE_DELAY, preferred})
    joined = _with_own(ours, theirs, {QUEUE_DELAY})
    if isinstance(joined, Mapping) and isinstance(theirs, Mapping) and preferred not in theirs:
        return {name: value for name, value in joined.items() if name != preferred}
    return joined


def _entries(message: Message, name: str) -> dict[str, Value]:
    """A map field."""
    found = {}
    for entry in repeated(message.get(name)):
        if isinstance(entry, Mapping):
            found[str(entry.get("key", ""))] = entry.get("value", "")
    return found


def _submessage(message: Message, name: str) -> Message:
    value = message.get(name)
    if not isinstance(value, Mapping):
        raise _OtherwiseError(name)
    return value


def _number(message: Message, name: str, usual: int | None = None, least: int = 0) -> int:
    """A whole number; ``usual`` where it is left out, if it may be."""
    value = message.get(name, usual)
    if not isinstance(value, int) or value < least:
        raise _OtherwiseError(name)
    return value


def _max_batch(message: Message) -> int | None:
    """None for 0, which is no setting: the server joins nothing there."""
    return _number(message, "max_batch_size") or None


def _group(message: Message) -> Message:
    """The one group of instances."""
    return _submessage(message, "instance_group")


def _gpus(message: Message) -> tuple[int, ...]:
    numbers = repeated(_group(message).get("gpus"))
    found = tuple(number for number in numbers if isinstance(number, int) and number >= 0)
    if len(set(found)) != len(numbers):
        raise _OtherwiseError("gpus")
    return found


def _threads(message: Message) -> int:
    value = _entries(message, "parameters").get(THREADS, {})
    text = value.get("string_value", "0") if isinstance(value, Mapping) else ""
    if not isinstance(text, str) or not text.isdecimal():
        raise _OtherwiseError(THREADS)
    return int(text)


def _queue_delay(message: Message) -> int | None:
    """None where nothing is joined, and so nothing waits."""
    if "dynamic_batching" not in message and message.get("max_batch_size") in (0, 1):
        return None
    return _number(_submessage(message, "dynamic_batching"), QUEUE_DELAY, 0)


def _keep_versions(message: Message) -> int:
    return _number(_submessage(_submessage(message, "version_policy"), "latest"), "num_versions", 1, least=1)


_READERS: Mapping[str, Callable[[Message], Any]] = {
    "max_batch": _max_batch,
    "instances": lambda message: _number(_group(message), "count", 1, least=1),
    "threads": _threads,
    "gpus": _gpus,
    "queue_delay_us": _queue_delay,
    "keep_versions": _keep_versions,
}
"""Each setting as Triton reads it: a number that is left out has its default."""
