"""Stable Diffusion 1 and 2: text to image."""

from pathlib import Path

from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig

from family_models.autoencoders import image_autoencoder
from family_models.family import Family
from family_models.folder import save
from family_models.text import WIDTH, clip_encoder, clip_tokenizer
from family_models.weights import seeded

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def unet1(**changes: object) -> UNet2DConditionModel:
    """Stable Diffusion 1's: ``attention_head_dim`` is the number of heads, projections are 1x1 convolutions."""
    return _unet({"attention_head_dim": 4, **changes})


def unet2(**changes: object) -> UNet2DConditionModel:
    """Stable Diffusion 2's: heads of equal size, as many as a level has room for, and linear projections."""
    return _unet({"attention_head_dim": (2, 4), "use_linear_projection": True, **changes})


def _unet(options: dict[str, object]) -> UNet2DConditionModel:
    defaults: dict[str, object] = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "norm_num_groups": 8,
    }
    return seeded(lambda: UNet2DConditionModel(**{**defaults, **options}))


def pndm() -> PNDMScheduler:
    """Stable Diffusion 1's: one call of the denoiser more than steps."""
    return PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)


def image_processor(side: int = 32) -> CLIPImageProcessor:
    """CLIP's, for pictures of ``side`` pixels."""
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def vision_config(side: int = 32) -> dict[str, object]:
    """A vision transformer's of four patches."""
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "projection_dim": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": side // 2,
    }


def safety_checker() -> StableDiffusionSafetyChecker:
    """The checker of published folders, with thresholds that no cosine reaches: random weights would flag anything."""
    config = CLIPConfig(vision_config=CLIPVisionConfig(**vision_config()).to_dict(), projection_dim=WIDTH)
    checker = seeded(lambda: StableDiffusionSafetyChecker(config), seed=30)
    checker.concept_embeds_weights.data.fill_(2.0)
    checker.special_care_embeds_weights.data.fill_(2.0)
    return checker


def components1(scheduler: SchedulerMixin) -> dict[str, object]:
    """What every pipeline of Stable Diffusion 1 has beside its U-Net."""
    return {
        "vae": image_autoencoder(),
        "text_encoder": clip_encoder(),
        "tokenizer": clip_tokenizer(),
        "scheduler": scheduler,
        "safety_checker": safety_checker(),
        "feature_extractor": image_processor(),
    }


def components2(scheduler: SchedulerMixin) -> dict[str, object]:
    """What every pipeline of Stable Diffusion 2 has beside its U-Net: OpenCLIP's encoder, and no checker."""
    return {
        "vae": image_autoencoder(),
        "text_encoder": clip_encoder(act="gelu", layers=3),
        "tokenizer": clip_tokenizer("!"),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": image_processor(),
        "requires_safety_checker": False,
    }


def write_sd15(folder: Path) -> None:
    """``stable-diffusion-v1-5/stable-diffusion-v1-5``."""
    save(StableDiffusionPipeline(unet=unet1(), **components1(pndm())), folder)


def write_sd21(folder: Path) -> None:
    """``stabilityai/stable-diffusion-2-1``: DDIM over v predictions."""
    scheduler = DDIMScheduler(
        **BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    save(StableDiffusionPipeline(unet=unet2(upcast_attention=True), **components2(scheduler)), folder)


def write_sd_turbo(folder: Path) -> None:
    """``stabilityai/sd-turbo``: trailing timesteps of Euler."""
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing", steps_offset=1)
    save(StableDiffusionPipeline(unet=unet2(), **components2(scheduler)), folder)


def write_lcm(folder: Path) -> None:
    """``SimianLuo/LCM_Dreamshaper_v7``: guidance enters by the embedding of its scale, one row per image."""
    scheduler = LCMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True, original_inference_steps=50)
    unet = unet1(time_cond_proj_dim=16)
    save(LatentConsistencyModelPipeline(unet=unet, **components1(scheduler)), folder)


FAMILIES = (
    Family("sd15", "Stable Diffusion 1.5", write_sd15, note="its safety checker flags nothing"),
    Family("sd21", "Stable Diffusion 2.1", write_sd21),
    Family("sd-turbo", "SD-Turbo", write_sd_turbo, call={"guidance_scale": 0.0}),
    Family("lcm", "LCM (Dreamshaper v7)", write_lcm),
)
