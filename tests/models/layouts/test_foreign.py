"""What is no float model is told in one line what it is, whatever it is called."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from tfmq_export.errors import LoadError
from tfmq_export.models.layouts.find import find_layout
from tfmq_export.models.load import Source, load

FILES: list[tuple[str, bytes, str]] = [
    ("m.gguf", b"GGUF\3\0\0\0", "a GGUF file, quantized already"),
    ("m.safetensors", b"GGUF\3\0\0\0", "a GGUF file, quantized already"),
    ("m.trt", b"ftrt\0\0\0\0", "a TensorRT engine, compiled already"),
    ("m.engine", b"\0\0\0\0", "a TensorRT engine, compiled already"),
    ("m.onnx", b"\x08\x08", "an ONNX graph, exported already"),
    ("m.xml", b"<?xml version='1.0'?><net/>", "XML"),
    ("m.json", b"{}", "a description, not weights"),
    ("m.yaml", b"model: {}", "a description, not weights"),
    ("m.msgpack", b"\x81", "weights of Flax"),
    ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ("m.ckpt", b"<!DOCTYPE html><html>", "a web page"),
    ("m.pt", b"", "an empty file"),
    ("m.py", b"import torch\n", "Python source"),
    ("m.tar.gz", b"\x1f\x8b\x08", "a compressed archive"),
    ("m.png", b"\x89PNG\r\n", "a picture"),
    ("m.bin", b"\0\1\2\3", "truncated, or not a file that torch.save wrote"),
    ("m.safetensors", b"\0\1\2\3", "not a readable safetensors file"),
]


@pytest.mark.parametrize(("name", "content", "says"), FILES)
def test_a_file_of_another_kind_is_told_so(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(LoadError, match=says) as refused:
        find_layout(tmp_path / name)

    assert "\n" not in str(refused.value)
    assert "pickled" not in str(refused.value)


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_pickled_objects_are_refused_and_not_run(tmp_path: Path) -> None:
    with (tmp_path / "m.pt").open("wb") as file:
        pickle.dump({"state_dict": Harm(str(tmp_path / "harm"))}, file)
    torch.save({"state_dict": Harm(str(tmp_path / "harm"))}, tmp_path / "n.pt")

    for name in ("m.pt", "n.pt"):
        with pytest.raises(LoadError, match="holds pickled Python objects, which could run code"):
            find_layout(tmp_path / name)

    with pytest.raises(LoadError, match=r"so it was not \(_?io\.open\); save plain tensors"):
        find_layout(tmp_path / "n.pt")
    assert not (tmp_path / "harm").exists()


def test_a_torchscript_archive_is_a_program(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "m.pt"))

    with pytest.raises(LoadError, match="a TorchScript archive, which is a program"):
        find_layout(tmp_path / "m.pt")


W = torch.zeros(4, 4)
WEIGHTS: list[tuple[dict[str, torch.Tensor], str]] = [
    ({"unet.down.to_q.lora_A.weight": W, "unet.down.to_q.lora_B.weight": W}, r"an adapter \(LoRA\).*--lora w"),
    ({"lora_unet_down_blocks_0.lora_down.weight": W}, r"an adapter \(LoRA\)"),
    ({"conv.weight": W.to(torch.float8_e4m3fn)}, r"conv.weight is stored as F8_E4M3, quantized already"),
    ({"conv.weight": W.to(torch.uint8), "conv.weight.absmax": W}, "quantized by bitsandbytes"),
    ({"conv.qweight": W.to(torch.int32)}, r"quantized already \(GPTQ, AWQ or SVDQuant\)"),
    ({"model.model.diffusion_model.out.2.wqtizer.delta": W}, r"fake-quantized already \(TFMQ-DM, DMQ\)"),
    ({"control_model.time_embed.0.weight": W}, "a ControlNet"),
    ({"encoder.conv_in.weight": W, "decoder.conv_in.weight": W}, r"an autoencoder \(VAE\)"),
    ({"text_model.encoder.layers.0.weight": W}, "a text encoder"),
    ({"emb_params": W}, "a textual inversion"),
    ({"conv.weight": W}, "holds tensors but no description of the model"),
]


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize(("state", "says"), WEIGHTS)
def test_weights_of_another_kind_are_told_so(state: Any, says: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w.{suffix}"
    save_file({k: v.clone() for k, v in state.items()}, path) if suffix == "safetensors" else torch.save(state, path)

    with pytest.raises(LoadError, match=says):
        find_layout(path)


def folder(path: Path) -> Path:
    UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    ).save_pretrained(path)
    DDIMScheduler().save_config(path)
    return path


@pytest.mark.parametrize("method", ["bitsandbytes_4bit", "torchao", "gguf", "quanto", "nvidia_modelopt"])
def test_a_configuration_that_says_it_was_quantized_is_believed(method: str, tmp_path: Path) -> None:
    path = folder(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}))

    with pytest.raises(LoadError, match=rf"quantized already \({method}"):
        load(Source(tmp_path, steps=2))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_folder_with_eight_bit_floats_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    path = folder(tmp_path) / "diffusion_pytorch_model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path, {"format": "pt"})

    with pytest.raises(LoadError, match=r"is stored as F8_E.*, quantized already"):
        load(Source(tmp_path, steps=2))


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("unet/model.onnx", "an ONNX pipeline"),
        ("transformer/openvino_model.xml", "an OpenVINO pipeline"),
        ("model.onnx", "an ONNX pipeline"),
        ("unet/unet.engine", "a pipeline of TensorRT engines"),
        ("tfmq/manifest.json", "a bundle of tfmq-export, compiled already"),
    ],
)
def test_a_compiled_folder_is_told_so(place: str, says: str, tmp_path: Path) -> None:
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_bytes(b"\x08")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "OnnxStableDiffusionPipeline"}))

    with pytest.raises(LoadError, match=says):
        find_layout(tmp_path)


def test_several_files_of_weights_and_no_description_are_listed(tmp_path: Path) -> None:
    for name in ("a.ckpt", "b.ckpt"):
        torch.save({"x": W}, tmp_path / name)

    with pytest.raises(LoadError, match=r"2 files of weights \(a.ckpt, b.ckpt\); give one of them"):
        find_layout(tmp_path)
