import pytest
from google.protobuf import struct_pb2, text_format
from standins.triton_schema import parse_config

from tfmq_export.serving.pbtxt import Symbol, map_entries, render


@pytest.mark.parametrize("text", ['a "quoted" name', "back\\slash", "two\nlines", "modèle", ""])
def test_any_text_comes_back(text: str) -> None:
    parsed = text_format.Parse(render({"string_value": text}), struct_pb2.Value())

    assert parsed.string_value == text


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
