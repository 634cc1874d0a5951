"""A transformer in a single file, under its published names, is the model of diffusers that predicts the same noise."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import save_file
from standins.single_files import ALIKE, State, opened, trained
from torch import Tensor

from tfmq_export.errors import LoadError
from tfmq_export.models.layouts import rules
from tfmq_export.models.layouts.single_transformers import flux_rules, sd3_rules
from tfmq_export.models.load import Source, load


def tiny_sd3() -> SD3Transformer2DModel:
    return trained(
        SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=64,
            num_attention_heads=1,
            joint_attention_dim=16,
            caption_projection_dim=64,
            pooled_projection_dim=24,
            out_channels=4,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        )
    )


def tiny_flux(guided: bool) -> FluxTransformer2DModel:
    return trained(
        FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=128,
            num_attention_heads=1,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=guided,
        )
    )


def written_back(state: Mapping[str, Tensor], table: list[rules.Rule], layers: int) -> State:
    """The tensors of a model of diffusers under their published names: each rule the other way round."""
    made: State = {}
    for each in table:
        for index in range(layers) if "{i}" in each.old else (0,):
            for leaf in ("",) if each.whole else (".weight", ".bias"):
                parts = [state.get(place.replace("{i}", str(index)) + leaf) for place in each.new]
                old = each.old.replace("{i}", str(index)) + leaf
                if all(part is not None for part in parts) and old not in made:
                    value = torch.cat([part for part in parts if part is not None]) if len(parts) > 1 else parts[0]
                    assert value is not None
                    made[old] = torch.cat(value.chunk(2)[::-1]) if each.swapped else value
    return made


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_stable_diffusion_3_is_read_as_diffusers_converts_it(prefix: str, tmp_path: Path) -> None:
    model = tiny_sd3()
    state = written_back(model.state_dict(), sd3_rules(2), 2)
    save_file(
        {**{f"{prefix}{k}": v.contiguous() for k, v in state.items()}, "vae.x": torch.ones(1)},
        tmp_path / "sd3.safetensors",
    )

    found = opened(tmp_path / "sd3.safetensors")

    theirs = convert_sd3_transformer_checkpoint_to_diffusers(dict(state))
    ours = found.model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    inputs = {
        "hidden_states": torch.randn(1, 4, 16, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 3, 16),
        "pooled_projections": torch.randn(1, 24),
    }
    torch.testing.assert_close(found.model(**inputs).sample, model(**inputs).sample, **ALIKE)
    assert found.scheduler["shift"] == 3.0


@pytest.mark.parametrize(
    ("name", "shape"),
    [("x_embedder.proj.weight", (4,)), ("joint_blocks.0.x_block.attn.qkv.weight", (3, 2)), ("pos_embed", (1, 0, 64))],
)
def test_shapes_that_make_no_sense_are_refused(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    state = written_back(tiny_sd3().state_dict(), sd3_rules(2), 2)
    torch.save({**state, name: torch.zeros(shape)}, tmp_path / "sd3.pt")

    with pytest.raises(LoadError, match=r"sd3\.pt: "):
        opened(tmp_path / "sd3.pt")


def test_flux_predicts_the_same_noise(tmp_path: Path) -> None:
    for guided in (True, False):
        model = tiny_flux(guided)
        save_file(written_back(model.state_dict(), flux_rules(128), 1), tmp_path / "flux.safetensors")

        found = opened(tmp_path / "flux.safetensors")

        inputs = {
            "hidden_states": torch.randn(1, 4, 16),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": torch.randn(1, 3, 24),
            "pooled_projections": torch.randn(1, 16),
            "img_ids": torch.zeros(4, 3),
            "txt_ids": torch.zeros(3, 3),
            **({"guidance": torch.tensor([3.5])} if guided else {}),
        }
        torch.testing.assert_close(found.model(**inputs).sample, model(**inputs).sample, **ALIKE)
        assert found.scheduler["use_dynamic_shifting"] is guided


def test_flux_is_renamed_as_diffusers_renames_it() -> None:
    # Their converter knows one width only, so the tensors of that width are never stored: one number, expanded.
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    state = written_back({k: torch.empty(v, device="meta") for k, v in shapes.items()}, flux_rules(3072), 1)

    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(state))
    ours, strange = rules.renamed(state, flux_rules(3072))

    assert not strange
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()} == shapes
    marked = {"final_layer.adaLN_modulation.1.bias": torch.arange(4.0)}
    assert rules.renamed(marked, flux_rules(3072))[0]["norm_out.linear.bias"].tolist() == [2, 3, 0, 1]


def test_a_flux_transformer_says_what_it_is_where_it_cannot_be_sampled(tmp_path: Path) -> None:
    save_file(written_back(tiny_flux(True).state_dict(), flux_rules(128), 1), tmp_path / "flux.safetensors")

    with pytest.raises(LoadError, match="cannot load 'FluxTransformer2DModel'"):
        load(Source(tmp_path / "flux.safetensors", steps=2))
