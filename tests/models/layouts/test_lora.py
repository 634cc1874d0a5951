"""LoRA files change the weights by what they mean, and all of them, or are refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FluxTransformer2DModel, UNet2DConditionModel
from nets.ldm_unet import LatentUNet
from safetensors.torch import save_file
from torch import Tensor, nn

from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.models.layouts.lora import LoraFile, fuse
from tfmq_export.models.layouts.unet_blocks import numbered, renamed, structure_of
from tfmq_export.models.load import Source, load

State = dict[str, Tensor]
QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"
OUT = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV = "up_blocks.0.resnets.0.conv1"
PROJECTION = "mid_block.attentions.0.proj_in"
RANK = 2


def tiny() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
    ).eval()


def factors(model: nn.Module, layer: str) -> tuple[Tensor, Tensor]:
    """Down [rank, inputs(, kernel)] and up [outputs, rank(, 1, 1)] of a layer, drawn."""
    weight = model.get_parameter(f"{layer}.weight")
    ones = [1] * (weight.ndim - 2)
    return torch.randn(RANK, *weight.shape[1:]), torch.randn(len(weight), RANK, *ones)


def meant(down: Tensor, up: Tensor) -> Tensor:
    return torch.einsum("or,r...->o...", up.flatten(1), down)


def write(path: Path, state: Mapping[str, Tensor], **metadata: str) -> LoraFile:
    save_file({name: value.contiguous().clone() for name, value in state.items()}, path, metadata or None)
    return LoraFile(path)


def pair(layer: str, model: nn.Module, down: str, up: str, name: str) -> tuple[State, dict[str, Tensor]]:
    """The two tensors of a layer in a file, and the change of its weight at alpha = rank."""
    a, b = factors(model, layer)
    return {f"{name}{down}": a, f"{name}{up}": b}, {f"{layer}.weight": meant(a, b)}


def kohya(layer: str) -> str:
    return "lora_unet_" + layer.replace(".", "_")


FORMS: list[Any] = [
    ("kohya", kohya, ".lora_down.weight", ".lora_up.weight"),
    ("peft in a pipeline", lambda layer: f"unet.{layer}", ".lora_A.weight", ".lora_B.weight"),
    ("peft alone", lambda layer: f"base_model.model.{layer}", ".lora_A.weight", ".lora_B.weight"),
    ("peft with a name", lambda layer: layer, ".lora_A.default.weight", ".lora_B.default.weight"),
    ("diffusers before peft", lambda layer: f"unet.{layer}", ".lora.down.weight", ".lora.up.weight"),
]


@pytest.mark.parametrize(("name", "down", "up"), [form[1:] for form in FORMS], ids=[form[0] for form in FORMS])
def test_a_file_changes_the_weights_by_what_it_means(name: Any, down: str, up: str, tmp_path: Path) -> None:
    model, before = tiny(), tiny().state_dict()
    state: State = {}
    changes: State = {}
    for layer in (QUERY, OUT, CONV, PROJECTION):
        tensors, change = pair(layer, model, down, up, name(layer))
        state, changes = state | tensors, changes | change

    said = fuse(model, LoraFile(write(tmp_path / "l.safetensors", state).path, 0.5))

    assert said == "LoRA l.safetensors at 0.5"
    for key, value in model.state_dict().items():
        wanted = before[key] + 0.5 * changes.get(key, torch.zeros(()))
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)


def test_the_oldest_names_are_of_attention_processors(tmp_path: Path) -> None:
    model, before = tiny(), tiny().state_dict()
    attention = OUT.removesuffix(".to_out.0")
    tensors, change = pair(OUT, model, ".down.weight", ".up.weight", f"unet.{attention}.processor.to_out_lora")

    fuse(model, write(tmp_path / "l.safetensors", tensors))

    torch.testing.assert_close(model.state_dict()[f"{OUT}.weight"], before[f"{OUT}.weight"] + change[f"{OUT}.weight"])


@pytest.mark.parametrize(
    ("where", "factor"),
    [("tensor", 0.25), ("header", 0.25), ("adapter_config", 0.25), ("pattern", 2.0), ("root", 0.5 / 2**0.5)],
)
def test_alpha_is_read_wherever_it_stands(where: str, factor: float, tmp_path: Path) -> None:
    model, before = tiny(), tiny().state_dict()
    tensors, change = pair(QUERY, model, ".lora_A.weight", ".lora_B.weight", f"unet.{QUERY}")
    metadata: dict[str, str] = {}
    alpha = {"lora_alpha": 0.5, "r": RANK}
    if where == "tensor":
        tensors[f"unet.{QUERY}.alpha"] = torch.tensor(0.5)
    elif where == "header":
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in alpha.items()})}
    else:
        more = {"pattern": {"alpha_pattern": {"attn2.to_q": 4.0}}, "root": {"use_rslora": True}}.get(where, {})
        (tmp_path / "adapter_config.json").write_text(json.dumps(alpha | more))

    fuse(model, write(tmp_path / "l.safetensors", tensors, **metadata))

    key = f"{QUERY}.weight"
    torch.testing.assert_close(model.state_dict()[key], before[key] + factor * change[key], rtol=1e-5, atol=1e-5)


def test_every_published_name_is_the_way_back_of_its_conversion() -> None:
    unet = LatentUNet(channels=(32, 64, 64), depths=(0, 1, 0), layers=2, context=12, heads=2)
    names = unet.state_dict()
    structure = structure_of(names, lambda name: tuple(names[name].shape), "u")
    config = {"layers_per_block": 2, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}

    for old, (new,) in renamed(structure, names).items():
        assert numbered(new, config) == old


def test_layers_may_have_their_published_names(tmp_path: Path) -> None:
    model, before = tiny(), tiny().state_dict()
    state: State = {}
    changes: State = {}
    for layer in (QUERY, CONV, PROJECTION):
        old = numbered(f"{layer}.weight", model.config)
        assert old is not None
        name = kohya(old.removesuffix(".weight"))
        tensors, change = pair(layer, model, ".lora_down.weight", ".lora_up.weight", name)
        state, changes = state | tensors, changes | change
    assert "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_q.lora_down.weight" in state

    fuse(model, write(tmp_path / "l.safetensors", state))

    for key, change in changes.items():
        torch.testing.assert_close(model.state_dict()[key], before[key] + change, rtol=1e-5, atol=1e-5)


def test_a_fused_projection_of_flux_is_split_as_its_weights_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=128,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    a, b = torch.randn(RANK, 128), torch.randn(384, RANK)
    c, d = torch.randn(RANK, 128), torch.randn(384 + 512, RANK)
    state = {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": a,
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": b,
        "lora_unet_single_blocks_0_linear1.lora_down.weight": c,
        "lora_unet_single_blocks_0_linear1.lora_up.weight": d,
    }

    fuse(model, write(tmp_path / "l.safetensors", state))

    after = model.state_dict()
    for part, name in enumerate(("to_q", "to_k", "to_v")):
        rows = slice(128 * part, 128 * part + 128)
        for key, change in (("transformer_blocks", b @ a), ("single_transformer_blocks", d @ c)):
            key = f"{key}.0.attn.{name}.weight"
            torch.testing.assert_close(after[key], before[key] + change[rows], rtol=1e-5, atol=1e-5)
    key = "single_transformer_blocks.0.proj_mlp.weight"
    torch.testing.assert_close(after[key], before[key] + (d @ c)[384:], rtol=1e-5, atol=1e-5)


A, B = torch.ones(RANK, 16), torch.ones(16, RANK)


def both(layer: str, down: Tensor = A) -> State:
    return {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": B}


REFUSED: list[tuple[State, str]] = [
    (both("lora_unet_no"), r"1 of its 1 layers are none of UNet2DConditionModel's \(lora_unet_no\)"),
    ({f"{kohya(QUERY)}.lora_down.weight": A}, r"1 tensors are no pair of a LoRA \(.*attn2_to_q.down\)"),
    (both(kohya(QUERY)) | {"odd.weight": A}, r"no pair of a LoRA \(odd.weight\)"),
    (both(kohya(QUERY), A[:, :3]), r"is \[16, 16\] in the model, \[16, 3\] in the file"),
    (both(kohya(QUERY), A * torch.inf), "NaN or infinity"),
    ({f"{kohya(QUERY)}.hada_w1_a": A}, "LoHa"),
    ({f"{kohya(QUERY)}.dora_scale": A}, "DoRA"),
    ({"lora_te_text_model.lora_down.weight": A}, "no LoRA for a denoiser"),
]


@pytest.mark.parametrize(("state", "says"), REFUSED)
def test_what_does_not_fit_is_refused_and_listed(state: State, says: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=says):
        fuse(tiny(), write(tmp_path / "l.safetensors", state))


def test_a_text_encoders_part_is_said_to_be_left_out(tmp_path: Path) -> None:
    model = tiny()
    tensors, _ = pair(QUERY, model, ".lora_down.weight", ".lora_up.weight", kohya(QUERY))
    tensors |= {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": A}

    assert fuse(model, write(tmp_path / "l.safetensors", tensors)).endswith("its 1 tensors for text encoders left out")


def test_a_scale_stands_behind_a_colon(tmp_path: Path) -> None:
    assert LoraFile.of("a/l.safetensors:0.8") == LoraFile(Path("a/l.safetensors"), 0.8)
    assert LoraFile.of("l.safetensors") == LoraFile(Path("l.safetensors"), 1.0)
    assert LoraFile.of("l.safetensors:-1").scale == -1
    odd = tmp_path / "a:b"
    odd.touch()
    assert LoraFile.of(str(odd)) == LoraFile(odd, 1.0)
    for text in ("l.safetensors:much", "l.safetensors:nan"):
        with pytest.raises(ConfigError, match=r"--lora l\.safetensors"):
            LoraFile.of(text)


def test_files_are_fused_in_order_and_recorded(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "m")
    DDIMScheduler().save_config(tmp_path / "m")
    (tmp_path / "m" / "p").mkdir()
    save_file({"encoder_hidden_states": torch.randn(2, 3, 12)}, tmp_path / "p.safetensors")
    tensors, change = pair(QUERY, model, ".lora_A.weight", ".lora_B.weight", f"unet.{QUERY}")
    path = write(tmp_path / "l.safetensors", tensors).path

    source = Source(tmp_path / "m", steps=2, conditioning=tmp_path / "p.safetensors", lora=(f"{path}:0.5", str(path)))
    denoiser = load(source)

    key = f"{QUERY}.weight"
    found = denoiser.module.model.state_dict()[key]
    torch.testing.assert_close(found, model.state_dict()[key] + 1.5 * change[key], rtol=1e-5, atol=1e-5)
    assert denoiser.source.endswith("(LoRA l.safetensors at 0.5; LoRA l.safetensors at 1)")


def test_a_factory_does_this_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--lora and --factory"):
        load(Source(tmp_path, factory="a:b", lora=("l",)))
