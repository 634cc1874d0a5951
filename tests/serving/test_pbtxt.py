import pytest
from google.protobuf import struct_pb2, text_format
from standins.triton_schema import parse_config

from tfmq_export.serving.pbtxt import Symbol, map_entries, parse, render, repeated


@pytest.mark.parametrize("text", ['a "quoted" name', "back\\slash", "two\nlines", "modèle", ""])
def test_any_text_comes_back(text: str) -> None:
    written = render({"string_value": text})

    assert text_format.Parse(written, struct_pb2.Value()).string_value == text
    assert parse(written) == {"string_value": text}


def test_messages_lists_maps_and_enums_come_back(tmp_path) -> None:
    message = {
        "name": "m",
        "max_batch_size": 4,
        "input": [
            {"name": "x", "data_type": Symbol("TYPE_FP32"), "dims": [3, -1]},
            {"name": "t", "data_type": Symbol("TYPE_INT64"), "dims": [1], "reshape": {"shape": []}},
        ],
        "response_cache": {"enable": True},
        "parameters": map_entries({"a": {"string_value": "1"}, "b": {"string_value": ""}}),
    }
    path = tmp_path / "config.pbtxt"
    path.write_text(render(message))

    parsed = parse_config(path)

    assert [list(each.dims) for each in parsed.input] == [[3, -1], [1]]
    assert parsed.input[1].HasField("reshape")
    assert not parsed.input[0].HasField("reshape")
    assert parsed.response_cache.enable
    assert {key: value.string_value for key, value in parsed.parameters.items()} == {"a": "1", "b": ""}


def test_the_schema_refuses_what_triton_would(tmp_path) -> None:
    path = tmp_path / "config.pbtxt"
    path.write_text(render({"name": "m", "max_batch": 4}))

    with pytest.raises(text_format.ParseError, match="max_batch"):
        parse_config(path)


CONFIG = """
# As people write them.
name: 'm' "odel";  max_batch_size : 4,
input [ { name: "x" data_type: TYPE_FP32 dims: [ 3, -1 ] }, { name: "t" dims: 1 reshape { shape: [] } } ]
output < name: "y", data_type: TYPE_FP32, dims: -1, dims: 2 >
instance_group: [ { kind: KIND_CPU # in the middle
  count: 2 } ]
parameters: { key: "mod\\303\\250le # no comment" value: { string_value: "a\\x41\\n\\t\\"\\\\ \\u00e8" } }
dynamic_batching { }
optimization { gather_kernel_buffer_threshold: 7 cuda { graphs: true } }
model_transaction_policy { decoupled: false }
"""


@pytest.mark.parametrize("utf8", [False, True])
@pytest.mark.parametrize("layout", ["as written", "lines", "one line", "short lists", "pointed"])
def test_what_is_read_and_written_again_means_the_same(layout: str, utf8: bool, tmp_path) -> None:
    path = tmp_path / "config.pbtxt"
    path.write_text(CONFIG, "utf-8")
    meant = parse_config(path)
    ways = {
        "lines": {},
        "one line": {"as_one_line": True},
        "short lists": {"use_short_repeated_primitives": True},
        "pointed": {"pointy_brackets": True},
    }
    if layout != "as written":
        path.write_text(text_format.MessageToString(meant, as_utf8=utf8, **ways[layout]), "utf-8")

    path.write_text(render(parse(path.read_text("utf-8"))), "utf-8")

    assert parse_config(path) == meant


def test_a_field_is_a_value_or_a_list() -> None:
    message = parse("a: 1 b: [ 2 ] c: 3 c: [ 4, 5 ] d: [] e: -0.5 f: TRUE g { h: 08 }")

    assert message == {"a": 1, "b": 2, "c": [3, 4, 5], "d": [], "e": "-0.5", "f": "TRUE", "g": {"h": "08"}}
    assert [repeated(message.get(name)) for name in "abcdx"] == [[1], [2], [3, 4, 5], [], []]
    assert repeated("text") == ["text"]
    assert render(message).splitlines()[-4:] == ["f: TRUE", "g {", "  h: 08", "}"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a", "it ends too early"),
        ("a: ", "it ends too early"),
        ("a { b: 1", "it ends too early"),
        ("a: [ 1, 2", "it ends too early"),
        ("a: 1\nb: [ 1 2 ]", "line 2: '2' is not expected"),
        ("a: 1 }", "line 1: '}' is not expected"),
        ('a: 1\n\nb: "never closed\n', "line 3: '\"' is not expected"),
        ("1: 2", "line 1: '1' is not expected"),
        ("[ext.field]: 2", "line 1: '\\[' is not expected"),
        ("a: 1 = 2", "line 1: '=' is not expected"),
        ("a: '\\377'", "can't decode"),
    ],
)
def test_what_is_no_text_format_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(text)
