"""DeepFloyd IF: pixels from T5's tokens."""

from pathlib import Path

from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel

from family_models.family import Family
from family_models.folder import save
from family_models.text import WIDTH, t5_encoder, t5_tokenizer
from family_models.weights import seeded


def write_if(folder: Path) -> None:
    """``DeepFloyd/IF-I-M-v1.0``, the first stage: three channels of noise and three of variance."""
    unet = seeded(
        lambda: UNet2DConditionModel(
            sample_size=16,
            in_channels=3,
            out_channels=6,
            block_out_channels=(32, 64),
            layers_per_block=2,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            act_fn="gelu",
            attention_head_dim=16,
            cross_attention_dim=64,
            cross_attention_norm="group_norm",
            encoder_hid_dim=WIDTH,
            addition_embed_type="text",
            addition_embed_type_num_heads=4,
            resnet_time_scale_shift="scale_shift",
            time_embedding_act_fn="gelu",
            norm_num_groups=8,
        )
    )
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.5,
    )
    pipeline = IFPipeline(
        tokenizer=t5_tokenizer(77),
        text_encoder=t5_encoder(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    save(pipeline, folder)


FAMILIES = (
    Family("deepfloyd-if", "DeepFloyd IF, stage 1", write_if, call={"output_type": "pt"}, note="no safety checker"),
)
