"""DeepFloyd IF's second stage: a small image and the level of its noise beside the sample."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import DDPMScheduler, IFSuperResolutionPipeline, UNet2DConditionModel
from diffusers.pipelines.deepfloyd_if.watermark import IFWatermarker

from family_models.family import Family
from family_models.folder import save
from family_models.images import IMAGE, write_image
from family_models.stable_diffusion import image_processor
from family_models.text import WIDTH, t5_encoder, t5_tokenizer
from family_models.weights import seeded

PIXELS = 32
"""Of a side; 256 in the published one."""


def if_scheduler(**options: object) -> DDPMScheduler:
    """Cosine betas, which the small image is noised by too; samples are thresholded by their own quantiles."""
    return DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", dynamic_thresholding_ratio=0.95, sample_max_value=1.5, **options
    )


def write_second(folder: Path) -> None:
    """``DeepFloyd/IF-II-L-v1.0``: the small image beside the sample, the level of its noise as a class."""
    unet = seeded(
        lambda: UNet2DConditionModel(
            sample_size=PIXELS,
            in_channels=6,
            out_channels=6,
            act_fn="gelu",
            addition_embed_type="text",
            addition_embed_type_num_heads=4,
            attention_head_dim=16,
            block_out_channels=(32, 64),
            class_embed_type="timestep",
            cross_attention_dim=WIDTH,
            cross_attention_norm="group_norm",
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            encoder_hid_dim=WIDTH,
            layers_per_block=1,
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            norm_num_groups=32,
            resnet_time_scale_shift="scale_shift",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        )
    )
    pipeline = IFSuperResolutionPipeline(
        tokenizer=t5_tokenizer(77),
        text_encoder=t5_encoder(),
        unet=unet,
        scheduler=if_scheduler(variance_type="learned_range", thresholding=True, clip_sample=False),
        image_noising_scheduler=if_scheduler(),
        safety_checker=None,
        feature_extractor=image_processor(),
        watermarker=IFWatermarker(),
        requires_safety_checker=False,
    )
    save(pipeline, folder)
    write_image(folder, PIXELS // 2)


NO_CHECKER = "draws pixels; without the published safety checker, which transformers 5 cannot load"
FAMILIES: Sequence[Family] = (
    Family("deepfloyd-if-2", "DeepFloyd IF, stage 2", write_second, call={"image": IMAGE}, note=NO_CHECKER),
)
