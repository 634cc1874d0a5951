"""Single files of Stable Diffusion 3 and FLUX.1: the transformer, its structure read off names and shapes."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor

from tfmq_export.errors import LoadError
from tfmq_export.models.layouts.descriptions import read_scheduler_beside
from tfmq_export.models.layouts.opened import Opened
from tfmq_export.models.layouts.rules import Rule, renamed, rule, tensor
from tfmq_export.models.layouts.tensor_file import State
from tfmq_export.models.weights import load_weights

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
SD3_FIRST, FLUX_FIRST = "joint_blocks.0.x_block.attn.qkv.weight", "double_blocks.0.img_attn.qkv.weight"
SD3_HEAD = 64
"""Channels of a head, in all published ones."""
FLUX_AXES: Mapping[int, tuple[int, ...]] = {128: (16, 56, 56)}
"""How a head's channels are shared by the axes of its rotary positions."""
BESIDE = ("first_stage_model.", "vae.", "text_encoders.", "cond_stage_model.", "model_sampling.")
"""Other parts of a pipeline in the same file."""
MLP_RATIO = 4
SAMPLE_SIZE = 128

Shape = Callable[[str], tuple[int, ...]]


def sd3_rules(layers: int) -> list[Rule]:
    """The table of Stable Diffusion 3.

    Args:
        layers: Joint blocks; the last one's norm of the prompt has its halves the other way round.
    """
    block = "transformer_blocks.{i}"
    rules = [
        tensor("pos_embed", "pos_embed.pos_embed"),
        rule("x_embedder.proj", "pos_embed.proj"),
        rule("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
        rule("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
        rule("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
        rule("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
        rule("context_embedder", "context_embedder"),
        rule("final_layer.linear", "proj_out"),
        rule("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True),
        rule(
            f"joint_blocks.{layers - 1}.context_block.adaLN_modulation.1",
            f"transformer_blocks.{layers - 1}.norm1_context.linear",
            swapped=True,
        ),
        rule("joint_blocks.{i}.context_block.adaLN_modulation.1", f"{block}.norm1_context.linear"),
        rule("joint_blocks.{i}.x_block.adaLN_modulation.1", f"{block}.norm1.linear"),
        rule("joint_blocks.{i}.x_block.attn.proj", f"{block}.attn.to_out.0"),
        rule("joint_blocks.{i}.context_block.attn.proj", f"{block}.attn.to_add_out"),
        rule("joint_blocks.{i}.x_block.attn2.proj", f"{block}.attn2.to_out.0"),
    ]
    for old, attention, names, norms in (
        ("x_block.attn", "attn", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")),
        ("context_block.attn", "attn", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")),
        ("x_block.attn2", "attn2", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")),
    ):
        rules.append(rule(f"joint_blocks.{{i}}.{old}.qkv", *(f"{block}.{attention}.{name}" for name in names)))
        rules += [
            rule(f"joint_blocks.{{i}}.{old}.ln_{letter}", f"{block}.{attention}.{norm}")
            for letter, norm in zip("qk", norms, strict=True)
        ]
    for old, feed in (("x_block", "ff"), ("context_block", "ff_context")):
        rules.append(rule(f"joint_blocks.{{i}}.{old}.mlp.fc1", f"{block}.{feed}.net.0.proj"))
        rules.append(rule(f"joint_blocks.{{i}}.{old}.mlp.fc2", f"{block}.{feed}.net.2"))
    return rules


def flux_rules(width: int) -> list[Rule]:
    """The table of FLUX.1.

    Args:
        width: Channels of a token.
    """
    block, single = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
    rules = [
        rule("img_in", "x_embedder"),
        rule("txt_in", "context_embedder"),
        rule("final_layer.linear", "proj_out"),
        rule("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True),
    ]
    for old, new in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        rules.append(rule(f"{old}.in_layer", f"time_text_embed.{new}_embedder.linear_1"))
        rules.append(rule(f"{old}.out_layer", f"time_text_embed.{new}_embedder.linear_2"))
    for old, norm, names, norms, feed, out in (
        ("img", "norm1", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "ff", "to_out.0"),
        (
            "txt",
            "norm1_context",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            ("norm_added_q", "norm_added_k"),
            "ff_context",
            "to_add_out",
        ),
    ):
        stem = f"double_blocks.{{i}}.{old}"
        rules += [
            rule(f"{stem}_mod.lin", f"{block}.{norm}.linear"),
            rule(f"{stem}_attn.qkv", *(f"{block}.attn.{name}" for name in names)),
            rule(f"{stem}_attn.proj", f"{block}.attn.{out}"),
            tensor(f"{stem}_attn.norm.query_norm.scale", f"{block}.attn.{norms[0]}.weight"),
            tensor(f"{stem}_attn.norm.key_norm.scale", f"{block}.attn.{norms[1]}.weight"),
            rule(f"{stem}_mlp.0", f"{block}.{feed}.net.0.proj"),
            rule(f"{stem}_mlp.2", f"{block}.{feed}.net.2"),
        ]
    parts = (*(f"{single}.attn.{name}" for name in ("to_q", "to_k", "to_v")), f"{single}.proj_mlp")
    return [
        *rules,
        rule("single_blocks.{i}.modulation.lin", f"{single}.norm.linear"),
        rule("single_blocks.{i}.linear1", *parts, sizes=(width, width, width, MLP_RATIO * width)),
        rule("single_blocks.{i}.linear2", f"{single}.proj_out"),
        tensor("single_blocks.{i}.norm.query_norm.scale", f"{single}.attn.norm_q.weight"),
        tensor("single_blocks.{i}.norm.key_norm.scale", f"{single}.attn.norm_k.weight"),
    ]


def prefix_of(state: State, first: str) -> str | None:
    """What stands in front of the transformer's names; None where there is none."""
    return next((prefix for prefix in PREFIXES if f"{prefix}{first}" in state.tensors), None)


def read_sd3(state: State, scheduler: Mapping[str, Any] | None = None) -> Opened:
    """The transformer of a single file of Stable Diffusion 3 or 3.5.

    Raises:
        LoadError: it is not complete, or of another structure.
    """
    names, shape, prefix = _inside(state, SD3_FIRST)
    try:
        layers = _count(names, "joint_blocks")
        width = shape("joint_blocks.0.x_block.attn.qkv.weight")[0] // 3
        channels, patch = shape("x_embedder.proj.weight")[1], shape("x_embedder.proj.weight")[2]
        positions = math.isqrt(shape("pos_embed")[1])
        config: dict[str, Any] = {
            "sample_size": min(SAMPLE_SIZE, positions * patch),
            "patch_size": patch,
            "in_channels": channels,
            "num_layers": layers,
            "attention_head_dim": SD3_HEAD,
            "num_attention_heads": width // SD3_HEAD,
            "joint_attention_dim": shape("context_embedder.weight")[1],
            "caption_projection_dim": width,
            "pooled_projection_dim": shape("y_embedder.mlp.0.weight")[1],
            "out_channels": shape("final_layer.linear.weight")[0] // patch**2,
            "pos_embed_max_size": positions,
            "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in names else None,
            "dual_attention_layers": tuple(
                layer for layer in range(layers) if f"joint_blocks.{layer}.x_block.attn2.qkv.weight" in names
            ),
        }
    except KeyError as error:
        raise _incomplete(state, error) from error
    with init_empty_weights():
        model = SD3Transformer2DModel(**config)
    load_weights(model, _converted(state, names, prefix, sd3_rules(layers)), state.path, assign=True)
    scheduler = (
        scheduler
        or read_scheduler_beside(state.path)
        or {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    )
    return Opened(model, scheduler, notes=("Stable Diffusion 3", *state.notes))


def read_flux(state: State, scheduler: Mapping[str, Any] | None = None) -> Opened:
    """The transformer of a single file of FLUX.1.

    Raises:
        LoadError: it is not complete, or of another structure.
    """
    names, shape, prefix = _inside(state, FLUX_FIRST)
    try:
        width, head = shape("img_in.weight")[0], shape("double_blocks.0.img_attn.norm.key_norm.scale")[0]
        if head not in FLUX_AXES:
            raise LoadError(
                f"{state.path}: attention heads of {head} channels, FLUX.1 has {', '.join(map(str, FLUX_AXES))}; give "
                "the folder in the format of diffusers"
            )
        guided = "guidance_in.in_layer.weight" in names
        channels, predicted = shape("img_in.weight")[1], shape("final_layer.linear.weight")[0]
        config: dict[str, Any] = {
            "in_channels": channels,
            "out_channels": predicted,
            "num_layers": _count(names, "double_blocks"),
            "num_single_layers": _count(names, "single_blocks"),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": shape("txt_in.weight")[1],
            "pooled_projection_dim": shape("vector_in.in_layer.weight")[1],
            "guidance_embeds": guided,
            "axes_dims_rope": FLUX_AXES[head],
        }
    except KeyError as error:
        raise _incomplete(state, error) from error
    with init_empty_weights():
        model = FluxTransformer2DModel(patch_size=1, **config)
    load_weights(model, _converted(state, names, prefix, flux_rules(width)), state.path, assign=True)
    shifted = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
    published = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        **(shifted if guided else {"use_dynamic_shifting": False, "shift": 1.0}),
    }
    notes = ("FLUX.1 dev" if guided else "FLUX.1 schnell", *state.notes)
    return Opened(model, scheduler or read_scheduler_beside(state.path) or published, notes=notes)


def _inside(state: State, first: str) -> tuple[frozenset[str], Shape, str]:
    prefix = prefix_of(state, first)
    assert prefix is not None, "the layout was recognized by it"
    names = frozenset(name.removeprefix(prefix) for name in state.tensors if name.startswith(prefix))
    return names, lambda name: state.shape(f"{prefix}{name}"), prefix


def _converted(state: State, names: frozenset[str], prefix: str, rules: Sequence[Rule]) -> dict[str, Tensor]:
    made, strange = renamed({name: state.tensors[f"{prefix}{name}"] for name in sorted(names)}, rules)
    if not prefix:
        strange = [name for name in strange if not name.startswith(BESIDE)]
    if strange:
        raise LoadError(
            f"{state.path}: {len(strange)} tensors have no place in diffusers' transformer ({', '.join(strange[:3])}); "
            "give the folder in the format of diffusers"
        )
    return made


def _count(names: frozenset[str], blocks: str) -> int:
    return len({found[1] for name in names if (found := re.match(rf"{blocks}\.(\d+)\.", name))})


def _incomplete(state: State, error: KeyError) -> LoadError:
    return LoadError(f"{state.path}: {error.args[0]} is missing; the file is not complete")
