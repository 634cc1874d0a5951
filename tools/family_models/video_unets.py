"""Video by U-Nets that attend over time: Stable Video Diffusion, AnimateDiff, text-to-video, I2VGen-XL. 2 frames."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLTemporalDecoder,
    DDIMScheduler,
    EulerDiscreteScheduler,
    I2VGenXLPipeline,
    I2VGenXLUNet,
    MotionAdapter,
    StableVideoDiffusionPipeline,
    TextToVideoSDPipeline,
    UNet3DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from family_models.autoencoders import SIDE, image_autoencoder
from family_models.family import Family
from family_models.folder import save
from family_models.images import IMAGE, write_image
from family_models.stable_diffusion import BETAS, image_processor, unet1, vision_config
from family_models.text import WIDTH, clip_encoder, clip_tokenizer
from family_models.weights import seeded

FRAMES = 2
NUMBER = 8
"""Channels of the embedding of one number."""
IMAGE_SIDE = 224
LEVELS_OF_CLIPS = {
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 16,
}
"""What the two U-Nets of ModelScope's line share."""
"""Pixels that Stable Video Diffusion's encoder of images is given, whatever its config says."""


def image_encoder(side: int = IMAGE_SIDE) -> CLIPVisionModelWithProjection:
    """CLIP's, of 49 patches: one embedding [rows, WIDTH] for an image."""
    config = CLIPVisionConfig(**{**vision_config(side), "patch_size": side // 7})
    return seeded(lambda: CLIPVisionModelWithProjection(config), seed=30)


def write_svd(folder: Path) -> None:
    """``stabilityai/stable-video-diffusion-img2vid``: latents of the image beside the sample, guidance by frame."""
    unet = seeded(
        lambda: UNetSpatioTemporalConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            block_out_channels=(32, 64),
            addition_time_embed_dim=NUMBER,
            projection_class_embeddings_input_dim=3 * NUMBER,
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            num_attention_heads=(2, 4),
            num_frames=FRAMES,
        )
    )
    autoencoder = seeded(
        lambda: AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 4,
            block_out_channels=(32, 32, 32, 32),
            sample_size=SIDE,
            force_upcast=True,
        ),
        seed=20,
    )
    scheduler = EulerDiscreteScheduler(
        **BETAS,
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_type="continuous",
        timestep_spacing="leading",
        steps_offset=1,
    )
    pipeline = StableVideoDiffusionPipeline(
        vae=autoencoder,
        image_encoder=image_encoder(),
        unet=unet,
        scheduler=scheduler,
        feature_extractor=image_processor(IMAGE_SIDE),
    )
    save(pipeline, folder)
    write_image(folder)


def write_animatediff(folder: Path) -> None:
    """``guoyww/animatediff-motion-adapter-v1-5-2`` on Stable Diffusion 1.5: one row of text for every frame."""
    adapter = seeded(
        lambda: MotionAdapter(
            block_out_channels=(32, 64),
            motion_num_attention_heads=4,
            motion_norm_num_groups=8,
            motion_max_seq_length=16,
        ),
        seed=1,
    )
    scheduler = DDIMScheduler(
        **{**BETAS, "beta_schedule": "linear"}, clip_sample=False, steps_offset=1, timestep_spacing="linspace"
    )
    pipeline = AnimateDiffPipeline(
        vae=image_autoencoder(),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        unet=unet1(),
        motion_adapter=adapter,
        scheduler=scheduler,
    )
    save(pipeline, folder)


def write_text_to_video(folder: Path) -> None:
    """``damo-vilab/text-to-video-ms-1.7b``: convolutions over time behind those over space, frames as an axis."""
    unet = seeded(lambda: UNet3DConditionModel(**LEVELS_OF_CLIPS))
    pipeline = TextToVideoSDPipeline(
        vae=image_autoencoder(),
        text_encoder=clip_encoder(act="gelu", layers=3),
        tokenizer=clip_tokenizer("!"),
        unet=unet,
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    )
    save(pipeline, folder)


def write_i2vgen(folder: Path) -> None:
    """``ali-vilab/i2vgen-xl``: an image as latents, as an embedding and as tokens, beside the prompt."""
    unet = seeded(lambda: I2VGenXLUNet(**LEVELS_OF_CLIPS))
    pipeline = I2VGenXLPipeline(
        vae=image_autoencoder(),
        text_encoder=clip_encoder(act="gelu", layers=3),
        tokenizer=clip_tokenizer("!"),
        image_encoder=image_encoder(),
        feature_extractor=image_processor(IMAGE_SIDE),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="squaredcos_cap_v2",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="leading",
        ),
    )
    save(pipeline, folder)
    write_image(folder)


SIZE = {"height": SIDE, "width": SIDE, "num_frames": FRAMES}
FAMILIES: Sequence[Family] = (
    Family(
        "svd",
        "Stable Video Diffusion",
        write_svd,
        call={**SIZE, "image": IMAGE},
        note="no prompt; its decoder has 32 channels, since its norms have 32 groups",
    ),
    Family("animatediff", "AnimateDiff", write_animatediff, call={"num_frames": FRAMES}),
    Family("text-to-video", "Text-to-video (ModelScope)", write_text_to_video, call={"num_frames": FRAMES}),
    Family(
        "i2vgen-xl",
        "I2VGen-XL",
        write_i2vgen,
        call={**SIZE, "image": IMAGE, "clip_skip": None},
        note="skips no layer of the text encoder: where the pipeline looks for its last norm, transformers 5 has none;"
        " latents of the image are drawn from torch's own generator",
    ),
)
