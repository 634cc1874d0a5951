"""Checkpoints of latent diffusion: LDM, Stable Diffusion 1 and 2, XL, as ``.ckpt`` or ``.safetensors``.

The U-Net comes out of them, and what it was trained on: the noise schedule from the file's own table or the YAML beside
it, the classes of a class-conditional model from their embedding. Text encoders and VAE stay where they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from tfmq_export.errors import LoadError
from tfmq_export.models.layouts.descriptions import looked_up, read_scheduler_beside, read_yaml_beside
from tfmq_export.models.layouts.opened import Opened
from tfmq_export.models.layouts.published import Family, family_of
from tfmq_export.models.layouts.tensor_file import State
from tfmq_export.models.layouts.unet_blocks import Structure, converted, renamed, structure_of
from tfmq_export.models.prompts import PromptSet
from tfmq_export.models.weights import load_weights

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
FIRST = "input_blocks.0.0.weight"
AVERAGED = "model_ema."
CLASSES = "cond_stage_model.embedding.weight"
SCHEDULE = {"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000}
"""Of Stable Diffusion."""
NORM_GROUPS = 32
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


@dataclass(frozen=True, slots=True)
class Known:
    """What the names and shapes do not say.

    Attributes:
        heads: Attention heads for a number of channels.
        sample_size: Height and width of the latent.
        prediction: As schedulers of diffusers call it; None where nothing says it.
    """

    heads: Callable[[int], int]
    sample_size: int | None
    prediction: str | None


def prefix_of(state: State) -> str | None:
    """What stands in front of the U-Net's names; None where there is no such U-Net."""
    return next((prefix for prefix in PREFIXES if f"{prefix}{FIRST}" in state.tensors), None)


def read_latent_diffusion(state: State, scheduler: Mapping[str, Any] | None = None) -> Opened:
    """The U-Net of a checkpoint of latent diffusion.

    Raises:
        LoadError: it is not complete, or something it needs is neither in the file nor beside it.
    """
    prefix = prefix_of(state)
    assert prefix is not None, "the layout was recognized by it"
    names = [name.removeprefix(prefix) for name in state.tensors if name.startswith(prefix)]
    structure = structure_of(names, lambda name: state.shape(f"{prefix}{name}"), str(state.path))
    trained, file = read_yaml_beside(state.path)
    family = family_of(tuple(level.channels for level in structure.levels), structure.context)
    known = known_of(structure, family, trained, state.path)
    places = renamed(structure, names)
    if strange := sorted(set(names) - places.keys()):
        raise LoadError(
            f"{state.path}: {len(strange)} tensors have no place in diffusers' U-Net ({', '.join(strange[:3])}); "
            "bring the model as your own module with --factory"
        )
    notes = list(state.notes)
    stored, averaged = _weights(state, prefix, names)
    notes += [f"EMA weights ({AVERAGED!r})"] * averaged
    with init_empty_weights():
        model = empty_model(structure, known, state.path)
    load_weights(model, converted(stored, places, known.heads), state.path, assign=True)
    notes.insert(0, f"{family.name if family else 'latent diffusion'}{f', described by {file.name}' if file else ''}")
    scheduler = scheduler or read_scheduler_beside(state.path) or _schedule(state, trained, known, family)
    prompts = PromptSet()
    if CLASSES in state.tensors and structure.context == state.shape(CLASSES)[1]:
        table = state.tensors[CLASSES].float()
        prompts = PromptSet({"encoder_hidden_states": table[:, None]}, {"encoder_hidden_states": table[-1][None]})
        notes.append(f"conditioned on its {len(table)} classes, of which guidance takes the last for none")
    return Opened(model, scheduler, prompts, tuple(notes))


def known_of(structure: Structure, family: Family | None, trained: Mapping[str, Any], path: Path) -> Known:
    """What the names and shapes do not say, from the YAML or the family.

    Raises:
        LoadError: neither says it.
    """
    params = looked_up(trained, "model", "params") or {}
    unet: Any = {}
    for name in ("unet_config", "network_config"):
        unet = unet or looked_up(params, name, "params") or {}
    size = params.get("image_size")
    prediction = params.get("parameterization")
    width, count = unet.get("num_head_channels", -1), unet.get("num_heads", -1)
    if width in (-1, None) and count in (-1, None):
        if family is None:
            raise LoadError(
                f"{path}: the number of attention heads is not in the file, and its widths are of no published model; "
                f"put the YAML it was trained with beside it, as {path.with_suffix('.yaml').name}"
            )
        width, count = family.head_channels or -1, family.heads or -1
    said = PREDICTIONS.get(str(prediction)) if prediction else None
    scaled = looked_up(params, "denoiser_config", "params", "scaling_config", "target") or ""
    if not said and params:
        said = "v_prediction" if "VScaling" in str(scaled) else "epsilon"
    return Known(
        heads=(lambda channels: channels // width) if width not in (-1, None) else lambda channels: count,
        sample_size=size if isinstance(size, int) else family.sample_size if family else None,
        prediction=said or (family.prediction if family else None),
    )


def _weights(state: State, prefix: str, names: list[str]) -> tuple[Mapping[str, Tensor], bool]:
    """The U-Net's tensors by name, the average over the training where the file has it; and whether it has."""
    flat = {name: f"{AVERAGED}{f'{prefix}{name}'.removeprefix('model.').replace('.', '')}" for name in names}
    if not state.raw and prefix == PREFIXES[0] and all(each in state.tensors for each in flat.values()):
        return {name: state.tensors[each] for name, each in flat.items()}, True
    return {name: state.tensors[f"{prefix}{name}"] for name in names}, False


def empty_model(structure: Structure, known: Known, path: Path) -> nn.Module:
    """The model of diffusers that is the same function, with weights of its own.

    Raises:
        LoadError: there is none, or its size is not known.
    """
    channels = tuple(level.channels for level in structure.levels)
    attends = [level.depth > 0 for level in structure.levels]
    if known.sample_size is None:
        raise LoadError(
            f"{path}: neither the file nor a YAML says the size of the latent; put the YAML it was trained with beside "
            f"it, as {path.with_suffix('.yaml').name}, with model.params.image_size"
        )
    shared: dict[str, Any] = {
        "sample_size": known.sample_size,
        "in_channels": structure.in_channels,
        "out_channels": structure.out_channels,
        "block_out_channels": channels,
        "layers_per_block": structure.layers,
        "norm_num_groups": NORM_GROUPS,
        "num_class_embeds": structure.classes,
        "resnet_time_scale_shift": "scale_shift" if structure.shift else "default",
    }
    if not structure.transformer:
        return _self_attending(structure, known, shared, attends)
    if structure.context is None or structure.resnet_samplers:
        raise LoadError(f"{path}: a U-Net that diffusers has no class for; bring it as your own module with --factory")
    depths = tuple(
        level.depth or (structure.middle if level is structure.levels[-1] else 1) for level in structure.levels
    )
    if depths[-1] != structure.middle:
        raise LoadError(
            f"{path}: {structure.middle} transformer layers in the middle and {depths[-1]} beside it, which a single "
            "file cannot say to diffusers; give the folder in the format of diffusers"
        )
    added: dict[str, Any] = {}
    if structure.added is not None:
        added["projection_class_embeddings_input_dim"] = structure.added
        if structure.context in (2048, 1280):
            added |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        else:
            added["class_embed_type"] = "projection"
    return UNet2DConditionModel(
        **shared,
        **added,
        down_block_types=tuple("CrossAttnDownBlock2D" if each else "DownBlock2D" for each in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attends)),
        cross_attention_dim=structure.context,
        # The name is historical: this is the number of heads.
        attention_head_dim=tuple(known.heads(width) for width in channels),
        use_linear_projection=structure.linear,
        transformer_layers_per_block=depths,
    )


def _self_attending(structure: Structure, known: Known, shared: Mapping[str, Any], attends: list[bool]) -> nn.Module:
    plain = "Resnet{}sampleBlock2D" if structure.resnet_samplers else "{}Block2D"
    down, up = (plain.format("Down"), plain.format("Up"))
    kind = "resnet" if structure.resnet_samplers else "conv"
    widths = [level.channels for level, each in zip(structure.levels, attends, strict=True) if each]
    widths = [width // known.heads(width) for width in (*widths, structure.levels[-1].channels)]
    same = len(set(widths)) == 1
    model = UNet2DModel(
        **shared,
        down_block_types=tuple("AttnDownBlock2D" if each else down for each in attends),
        up_block_types=tuple("AttnUpBlock2D" if each else up for each in reversed(attends)),
        downsample_type=kind,
        upsample_type=kind,
        attn_norm_num_groups=NORM_GROUPS,
        attention_head_dim=widths[0] if same else None,
    )
    # Where the number of heads is fixed their widths differ, which the configuration of the class cannot say.
    for module in model.modules():
        if not same and hasattr(module, "to_q") and hasattr(module, "heads"):
            module.heads = known.heads(module.to_q.out_features)
            module.scale = (module.to_q.out_features // module.heads) ** -0.5
    return model


def _schedule(state: State, trained: Mapping[str, Any], known: Known, family: Family | None) -> Mapping[str, Any]:
    """The noise schedule: the file's own table, the YAML, or what the published models share."""
    params = looked_up(trained, "model", "params") or {}
    if known.prediction is None and "v_pred" not in state.tensors:
        raise LoadError(
            f"{state.path}: {family.name if family else 'the file'} does not say whether it predicts noise or v; put "
            "its YAML beside it (v2-inference.yaml or v2-inference-v.yaml), or a scheduler_config.json"
        )
    config: dict[str, Any] = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": int(params.get("timesteps", SCHEDULE["timesteps"])),
        "beta_schedule": "scaled_linear",
        "beta_start": params.get("linear_start", SCHEDULE["linear_start"]),
        "beta_end": params.get("linear_end", SCHEDULE["linear_end"]),
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "v_prediction" if "v_pred" in state.tensors else known.prediction,
    }
    if "ztsnr" in state.tensors:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if "betas" not in state.tensors:
        if family is None and "linear_start" not in params:
            raise LoadError(
                f"{state.path}: neither the file (betas) nor a YAML (linear_start) says the noise schedule; "
                "put the YAML or a scheduler_config.json beside it"
            )
        return config
    betas = state.tensors["betas"].double()
    start, end = float(betas[0]), float(betas[-1])
    config |= {"num_train_timesteps": len(betas), "beta_start": start, "beta_end": end}
    roots = torch.linspace(start**0.5, end**0.5, len(betas), dtype=torch.float64).square()
    if not torch.allclose(roots, betas, rtol=1e-4):
        config |= {"trained_betas": betas.tolist()}
    return config
