"""Stable Diffusion given an image: inpainting, instructions, enlarging, variations, control, image to image."""

from pathlib import Path

from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    MarigoldDepthPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImageVariationPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionUpscalePipeline,
    T2IAdapter,
    UniPCMultistepScheduler,
)
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from family_models.autoencoders import image_autoencoder
from family_models.family import Family
from family_models.folder import save
from family_models.images import IMAGE, MASK, write_image, write_mask
from family_models.stable_diffusion import BETAS, components1, components2, pndm, unet1, unet2, vision_config
from family_models.text import WIDTH
from family_models.weights import seeded


def write_inpainting(folder: Path) -> None:
    """``stable-diffusion-v1-5/stable-diffusion-inpainting``: the mask and the masked image beside the latents."""
    save(StableDiffusionInpaintPipeline(unet=unet1(in_channels=9), **components1(pndm())), folder)
    write_image(folder)
    write_mask(folder)


def write_instructions(folder: Path) -> None:
    """``timbrooks/instruct-pix2pix``: the image beside the latents, three rows per image."""
    scheduler = EulerAncestralDiscreteScheduler(**BETAS, steps_offset=1)
    save(StableDiffusionInstructPix2PixPipeline(unet=unet1(in_channels=8), **components1(scheduler)), folder)
    write_image(folder)


def write_upscaler(folder: Path) -> None:
    """``stabilityai/stable-diffusion-x4-upscaler``: the small image beside the latents, a level of noise as class."""
    scheduler = DDIMScheduler(
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = components2(scheduler) | {"vae": image_autoencoder(scaling=0.08333, levels=3), "feature_extractor": None}
    parts.pop("requires_safety_checker")
    unet = unet2(
        in_channels=7,
        num_class_embeds=1000,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        only_cross_attention=(True, False),
    )
    low = DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear")
    save(StableDiffusionUpscalePipeline(unet=unet, low_res_scheduler=low, max_noise_level=350, **parts), folder)
    write_image(folder, side=16)


def write_variation(folder: Path) -> None:
    """``lambdalabs/sd-image-variations-diffusers``: one embedding of an image instead of a prompt's."""
    parts = components1(pndm())
    parts = {name: part for name, part in parts.items() if name not in {"text_encoder", "tokenizer"}}
    config = CLIPVisionConfig(**vision_config())
    encoder = seeded(lambda: CLIPVisionModelWithProjection(config), seed=31)
    unet = unet1(cross_attention_dim=WIDTH)
    save(StableDiffusionImageVariationPipeline(unet=unet, image_encoder=encoder, **parts), folder)
    write_image(folder)


def write_controlnet(folder: Path) -> None:
    """Stable Diffusion 1.5 with ``lllyasviel/sd-controlnet-canny``, saved as one pipeline."""
    controlnet = seeded(
        lambda: ControlNetModel(
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            layers_per_block=2,
            attention_head_dim=4,
            cross_attention_dim=WIDTH,
            norm_num_groups=8,
            conditioning_embedding_out_channels=(8, 8, 16, 16),  # three halvings, as the autoencoder makes
        ),
        seed=40,
    )
    scheduler = UniPCMultistepScheduler(**BETAS, steps_offset=1)
    save(StableDiffusionControlNetPipeline(unet=unet1(), controlnet=controlnet, **components1(scheduler)), folder)
    write_image(folder)


def write_image_to_image(folder: Path) -> None:
    """Stable Diffusion 1.5 that starts from a picture."""
    save(StableDiffusionImg2ImgPipeline(unet=unet1(), **components1(pndm())), folder)
    write_image(folder)


def write_adapter(folder: Path) -> None:
    """Stable Diffusion 1.5 with ``TencentARC/t2iadapter_canny_sd15v2``: one call of the adapter for all steps."""
    adapter = seeded(
        lambda: T2IAdapter(
            in_channels=3, channels=[32, 64], num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter"
        ),
        seed=40,
    )
    save(StableDiffusionAdapterPipeline(unet=unet1(), adapter=adapter, **components1(pndm())), folder)
    write_image(folder)


def write_depth(folder: Path) -> None:
    """``prs-eth/marigold-depth-v1-1``: Stable Diffusion 2 that draws the depth of an image, for the empty prompt."""
    scheduler = DDIMScheduler(
        **BETAS,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
    parts = {name: components2(scheduler)[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    pipeline = MarigoldDepthPipeline(
        unet=unet2(in_channels=8),
        prediction_type="depth",
        scale_invariant=True,
        shift_invariant=True,
        default_denoising_steps=4,
        default_processing_resolution=768,
        **parts,
    )
    save(pipeline, folder)
    write_image(folder)


FAMILIES = (
    Family("sd-inpainting", "Stable Diffusion inpainting", write_inpainting, call={"image": IMAGE, "mask_image": MASK}),
    Family("instruct-pix2pix", "InstructPix2Pix", write_instructions, call={"image": IMAGE}),
    Family("sd-x4-upscaler", "Stable Diffusion x4 upscaler", write_upscaler, call={"image": IMAGE}),
    Family("sd-image-variation", "Stable Diffusion image variations", write_variation, call={"image": IMAGE}),
    Family("sd-controlnet", "Stable Diffusion 1.5 with ControlNet", write_controlnet, call={"image": IMAGE}),
    Family("sd-img2img", "Stable Diffusion 1.5, image to image", write_image_to_image, call={"image": IMAGE}),
    Family("sd-t2i-adapter", "Stable Diffusion 1.5 with T2I-Adapter", write_adapter, call={"image": IMAGE}),
    Family(
        "marigold-depth",
        "Marigold depth",
        write_depth,
        call={"image": IMAGE, "processing_resolution": 64, "output_type": "np"},
    ),
)
