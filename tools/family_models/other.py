"""All families that draw video, sound or depth, or that draw images in an uncommon way."""

from collections.abc import Mapping

from family_models import (
    audio,
    deepfloyd_upscaler,
    hunyuan_video_15,
    joint,
    ltx2,
    music,
    shap_e,
    stable_diffusion_kin,
    video,
    video_unets,
    video_variants,
)
from family_models.family import Family

FAMILIES: tuple[Family, ...] = (
    *video.FAMILIES,
    *video_variants.FAMILIES,
    *ltx2.FAMILIES,
    *hunyuan_video_15.FAMILIES,
    *video_unets.FAMILIES,
    *audio.FAMILIES,
    *music.FAMILIES,
    *stable_diffusion_kin.FAMILIES,
    *deepfloyd_upscaler.FAMILIES,
    *joint.FAMILIES,
    *shap_e.FAMILIES,
)

NEEDS: Mapping[str, tuple[str, ...]] = {
    "wan21": ("accelerate",),
    "wan21-i2v": ("accelerate", "ftfy"),
    "wan21-vace": ("accelerate",),
    "wan22": ("accelerate",),
    "wan22-ti2v": ("accelerate",),
    "skyreels-v2": ("accelerate",),
}
"""Packages without which diffusers does not load or call a family: they are no dependencies of diffusers itself."""

SKIPPED: Mapping[str, str] = {
    "Paint by Example": "diffusers 0.42 does not find the class of its image encoder among deprecated pipelines",
    "unCLIP (Karlo)": "diffusers 0.42 does not find the class of its text projection among deprecated pipelines",
    "MusicLDM": "diffusers 0.42 takes CLAP's text features for a tensor, which they are not in transformers 5",
    "Kolors": "its tokenizer is read by sentencepiece",
    "OmniGen": "its processor of images needs torchvision",
    "ConsisID": "features of a face are tensors in its call, which packages outside diffusers compute",
    "Cosmos": "its pipelines are made with a checker of the package cosmos_guardrail, which downloads weights",
    "ValueGuidedRL": "its pipeline is built around an environment of gym; see the planner in own_code",
}
"""What was left out, and why. Each is a fact about the installed releases, and may change."""
