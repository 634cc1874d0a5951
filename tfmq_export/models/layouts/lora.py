"""LoRA files fused into a model's weights: ``W + scale * (alpha / rank) * up @ down``, in float32.

Files of diffusers and PEFT name a layer by its path; files of kohya name it with underscores, in diffusers' names or in
those of the published checkpoint. Each tensor of a file must belong to a layer, or the file is refused: an adapter that
was fused in part draws other pictures than it was trained for, and nothing else would show it.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.models.layouts import rules
from tfmq_export.models.layouts.single_transformers import flux_rules, sd3_rules
from tfmq_export.models.layouts.states import read_state
from tfmq_export.models.layouts.tensor_file import State
from tfmq_export.models.layouts.unet_blocks import numbered
from tfmq_export.recipe.plain import parsed, read_json

DOWN = ("lora_down.weight", "lora_A.weight", "lora_A.default.weight", "lora.down.weight", "down.weight")
UP = ("lora_up.weight", "lora_B.weight", "lora_B.default.weight", "lora.up.weight", "up.weight")
ALPHA = "alpha"
OLD = re.compile(r"(?P<attention>.+)\.processor\.(?P<layer>to_q|to_k|to_v|to_out)_lora$")
"""How diffusers named layers before PEFT."""
TEXT = ("lora_te_", "lora_te1_", "lora_te2_", "text_encoder.", "text_encoder_2.", "text_encoder_3.", "lora_te3_")
PREFIXES = (
    "base_model.model.", "unet.", "transformer.", "diffusion_model.", "model.diffusion_model.", "lora_unet_",
    "lora_transformer_",
)  # fmt: skip
OTHER_KINDS: Mapping[str, str] = {
    ".hada_w": "LoHa",
    ".lokr_w": "LoKr",
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lora_mid": "LoCon with a middle (Tucker)",
    ".oft_": "OFT",
}
SHOWN = 3


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A file to fuse, and how strongly.

    Attributes:
        path: safetensors, or a ``torch.save``d state dict.
        scale: Times the change that the file means.
    """

    path: Path
    scale: float = 1.0

    @staticmethod
    def of(text: str) -> "LoraFile":
        """``FILE`` or ``FILE:SCALE``.

        Raises:
            ConfigError: the scale is no finite number.
        """
        name, colon, number = text.rpartition(":")
        if not colon or Path(text).exists():
            return LoraFile(Path(text))
        try:
            scale = float(number)
        except ValueError:
            if re.fullmatch(r"[a-zA-Z]", name):  # a drive
                return LoraFile(Path(text))
            raise ConfigError(f"--lora {text}: {number!r} is no scale; give FILE or FILE:SCALE, as 0.8") from None
        if not math.isfinite(scale):
            raise ConfigError(f"--lora {text}: a scale of {scale:g}; give a finite number")
        return LoraFile(Path(name), scale)


@dataclass(frozen=True, slots=True)
class _Change:
    """What a file adds to one weight.

    Attributes:
        down: [rank, inputs(, kernel)].
        up: [outputs, rank(, 1, 1)].
        factor: alpha / rank.
    """

    down: Tensor
    up: Tensor
    factor: float

    def of_weight(self) -> Tensor:
        """[outputs, inputs(, kernel)], or [outputs, inputs] for layers without a kernel."""
        change = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.factor * change.reshape(len(self.up), *self.down.shape[1:])


@torch.no_grad()
def fuse(model: nn.Module, lora: LoraFile) -> str:
    """Fuse a file into a model's weights, in place.

    Returns:
        What was done, for the record.
    Raises:
        LoadError: the file is unreadable, of a kind that is not fused here, or not this model's; lists some keys.
    """
    state = read_state(lora.path)
    changes, text = _read(state)
    if not changes:
        raise LoadError(f"{lora.path}: no LoRA for a denoiser (lora_down and lora_up, or lora_A and lora_B)")
    found, strange = _placed(model, changes)
    if strange:
        raise LoadError(
            f"{lora.path}: {len(strange)} of its {len(changes)} layers are none of {type(model).__name__}'s "
            f"({', '.join(sorted(strange)[:SHOWN])}{', ...' if len(strange) > SHOWN else ''}); it was trained for "
            "another model"
        )
    weights = dict(model.named_parameters())
    for name, change in found.items():
        weight = weights[name]
        if change.numel() != weight.numel() or change.shape[:2] != weight.shape[:2]:
            raise LoadError(
                f"{lora.path}: {name} is {list(weight.shape)} in the model, {list(change.shape)} in the file; it was "
                "trained for another model"
            )
        if not change.isfinite().all():
            raise LoadError(f"{lora.path}: {name} holds NaN or infinity; the file is damaged")
        weight.add_(change.reshape(weight.shape).to(weight), alpha=lora.scale)
    beside = f", its {text} tensors for text encoders left out" if text else ""
    return f"LoRA {lora.path.name} at {lora.scale:g}{beside}"


def _read(state: State) -> tuple[dict[str, _Change], int]:
    """The changes of a file by layer, as it names layers; and how many tensors are for text encoders."""
    layers: dict[str, dict[str, Tensor]] = {}
    strange, text = [], 0
    for name in state.tensors:
        if name.startswith(TEXT):
            text += 1
            continue
        for kind in OTHER_KINDS:
            if kind in name:
                raise LoadError(
                    f"{state.path}: {OTHER_KINDS[kind]} ({name}), while plain LoRA alone is fused here; merge it into "
                    "the model with the tool that made it"
                )
        part = next((suffix for suffix in (*DOWN, *UP, ALPHA) if name.endswith(f".{suffix}")), None)
        if part is None:
            strange.append(name)
            continue
        role = ALPHA if part == ALPHA else "down" if part in DOWN else "up"
        # "to_q_lora.down.weight" is a layer "to_q_lora"; "to_q.lora_down.weight" is one "to_q".
        layers.setdefault(name[: -len(part) - 1], {})[role] = state.tensors[name]
    alone = [f"{layer}.{role}" for layer, each in layers.items() for role in each if not {"down", "up"} <= each.keys()]
    if strange or alone:
        listed = ", ".join([*strange, *alone][:SHOWN])
        raise LoadError(
            f"{state.path}: {len(strange) + len(alone)} tensors are no pair of a LoRA ({listed}); the file is not "
            "complete, or of another kind"
        )
    alphas = _alphas(state)
    changes = {}
    for layer, each in layers.items():
        rank = len(each["down"])
        alpha = float(each[ALPHA]) if ALPHA in each else alphas(layer, rank)
        changes[layer] = _Change(each["down"], each["up"], alpha / rank)
    return changes, text


def _alphas(state: State) -> Callable[[str, int], float]:
    """What a file says of alpha elsewhere: in its header, or in PEFT's adapter_config.json beside it."""
    said: Mapping[str, object] = {}
    try:
        if "lora_adapter_metadata" in state.metadata:
            stored = parsed(state.metadata["lora_adapter_metadata"])
            parts = ("unet.", "transformer.")
            said = {next((k.removeprefix(p) for p in parts if k.startswith(p)), k): v for k, v in stored.items()}
        elif (beside := state.path.parent / "adapter_config.json").is_file():
            said = read_json(beside)
    except (OSError, ValueError, AttributeError) as error:
        raise LoadError(f"{state.path}: its description of alpha and rank is not readable JSON") from error
    alpha, patterns = said.get("lora_alpha"), said.get("alpha_pattern") or {}
    root = bool(said.get("use_rslora"))

    def of(layer: str, rank: int) -> float:
        value = alpha
        if isinstance(patterns, Mapping):
            value = next((each for key, each in patterns.items() if f".{layer}".endswith(f".{key}")), alpha)
        if not isinstance(value, int | float):
            return float(rank)
        return float(value) * (math.sqrt(rank) if root else 1.0)

    return of


def _placed(model: nn.Module, changes: Mapping[str, _Change]) -> tuple[dict[str, Tensor], list[str]]:
    """Changes by the weight of the model that they are of, and the layers that are none of its."""
    own = {name.removesuffix(".weight") for name, value in model.named_parameters() if value.ndim > 1}
    flat = {name.replace(".", "_"): name for name in own}
    found: dict[str, Tensor] = {}
    elsewhere: dict[str, str] = {}
    for layer, change in changes.items():
        bare = _bare(layer)
        name = bare if bare in own else flat.get(bare)
        if name is None:
            elsewhere[layer] = bare
        else:
            found[f"{name}.weight"] = change.of_weight()
    if not elsewhere:
        return found, []
    published = _published_names(model)
    flat = {name.removesuffix(".weight").replace(".", "_"): name for name in published.names}
    strange = []
    for layer, bare in elsewhere.items():
        name = flat.get(bare.replace(".", "_"))
        if name is None:
            strange.append(layer)
        else:
            found |= published.converted({name: changes[layer].of_weight()})
    return found, strange


def _bare(layer: str) -> str:
    """A layer's name without what tools put in front, in today's spelling."""
    for _ in PREFIXES:
        layer = next((layer.removeprefix(prefix) for prefix in PREFIXES if layer.startswith(prefix)), layer)
    if old := OLD.match(layer):
        return f"{old['attention']}.{old['layer']}{'.0' if old['layer'] == 'to_out' else ''}"
    return layer


@dataclass(frozen=True, slots=True)
class _Published:
    """How the weights of a model are called in its published checkpoint.

    Attributes:
        names: Of weights there.
        converted: From tensors of some of these names to the model's.
    """

    names: tuple[str, ...]
    converted: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def _published_names(model: nn.Module) -> _Published:
    if isinstance(model, UNet2DConditionModel):
        places = {old: new for new in dict(model.named_parameters()) if (old := numbered(new, model.config))}
        return _Published(tuple(places), lambda given: {places[name]: value for name, value in given.items()})
    if isinstance(model, FluxTransformer2DModel | SD3Transformer2DModel):
        settings: Mapping[str, int] = model.config
        width = settings["num_attention_heads"] * settings["attention_head_dim"]
        flux = isinstance(model, FluxTransformer2DModel)
        table = flux_rules(width) if flux else sd3_rules(settings["num_layers"])
        count = max(settings["num_layers"], settings.get("num_single_layers", 0))
        names = tuple(
            f"{each.old.replace('{i}', str(index))}.weight"
            for each in table
            for index in (range(count) if "{i}" in each.old else (0,))
            if not each.whole
        )
        known = set(model.state_dict())
        return _Published(names, lambda given: {k: v for k, v in rules.renamed(given, table)[0].items() if k in known})
    return _Published((), lambda given: {})
