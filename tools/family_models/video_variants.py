"""More video by transformers: from an image by LTX-Video, FramePack, Wan VACE, SkyReels-V2, Sana-Video, EasyAnimate."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import (
    AutoencoderKLMagvit,
    DPMSolverMultistepScheduler,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    LTXImageToVideoPipeline,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from family_models.autoencoders import SIDE
from family_models.family import Family
from family_models.folder import save
from family_models.images import IMAGE, write_image
from family_models.language_models import QWEN_VOCABULARY, gemma_encoder, gemma_tokenizer, qwen_tokenizer
from family_models.text import WIDTH
from family_models.video import (
    ACCELERATE,
    HUNYUAN,
    SIZE,
    hunyuan_components,
    ltx_components,
    wan_autoencoder,
    wan_components,
)
from family_models.weights import seeded

WAN = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "text_dim": WIDTH,
    "freq_dim": 32,
    "ffn_dim": 128,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def write_ltx_image(folder: Path) -> None:
    """``Lightricks/LTX-Video`` by its pipeline for images: a timestep for every token, zero for those of the image."""
    save(LTXImageToVideoPipeline(**ltx_components()), folder)
    write_image(folder, 128)


def write_vace(folder: Path) -> None:
    """``Wan-AI/Wan2.1-VACE-1.3B-diffusers``: a second stream of blocks reads 96 channels of control."""
    transformer = seeded(lambda: WanVACETransformer3DModel(**WAN, vace_layers=[0, 1], vace_in_channels=96))
    save(WanVACEPipeline(transformer=transformer, **wan_components()), folder)


def write_skyreels(folder: Path) -> None:
    """``Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers``: a timestep for every frame, the rate of frames as a number."""
    transformer = seeded(lambda: SkyReelsV2Transformer3DModel(**WAN, inject_sample_info=True))
    save(SkyReelsV2DiffusionForcingPipeline(transformer=transformer, **wan_components(8.0)), folder)


def write_sana_video(folder: Path) -> None:
    """``Efficient-Large-Model/SANA-Video_2B_480p_diffusers``: linear attention with rotary positions."""
    transformer = seeded(
        lambda: SanaVideoTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=4,
            cross_attention_head_dim=16,
            cross_attention_dim=64,
            caption_channels=WIDTH,
            sample_size=8,
            rope_max_seq_len=32,
        )
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=8.0,
        beta_schedule="linear",
        algorithm_type="dpmsolver++",
    )
    pipeline = SanaVideoPipeline(gemma_tokenizer(300), gemma_encoder(), wan_autoencoder(), transformer, scheduler)
    save(pipeline, folder)


PARTS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}{{ part.text }}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Of a chat whose messages are lists of parts."""


def qwen2_encoder() -> Qwen2VLForConditionalGeneration:
    """Embeddings [rows, tokens, WIDTH], and a side for images that a prompt leaves alone."""
    text = {
        "vocab_size": len(QWEN_VOCABULARY),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1000000.0},
        "bos_token_id": QWEN_VOCABULARY["<|endoftext|>"],
        "eos_token_id": QWEN_VOCABULARY["<|im_end|>"],
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision)
    return seeded(lambda: Qwen2VLForConditionalGeneration(config), seed=15)


def write_easyanimate(folder: Path) -> None:
    """``alibaba-pai/EasyAnimateV5.1-7b-zh-diffusers``: text and video have projections of their own in each block."""
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = PARTS
    transformer = seeded(
        lambda: EasyAnimateTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=16,
            out_channels=16,
            patch_size=2,
            sample_width=8,
            sample_height=8,
            num_layers=2,
            mmdit_layers=2,
            time_embed_dim=32,
            add_norm_text_encoder=True,
            text_embed_dim=WIDTH,
        )
    )
    autoencoder = seeded(
        lambda: AutoencoderKLMagvit(block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_num_groups=4), seed=20
    )
    pipeline = EasyAnimatePipeline(
        vae=autoencoder,
        text_encoder=qwen2_encoder(),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
    save(pipeline, folder)


def write_framepack(folder: Path) -> None:
    """``lllyasviel/FramePackI2V_HY``: earlier frames at three resolutions, and the place of each frame as a number."""
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    transformer = seeded(
        lambda: HunyuanVideoFramepackTransformer3DModel(
            **HUNYUAN, has_image_proj=True, image_proj_dim=32, has_clean_x_embedder=True
        )
    )
    pipeline = HunyuanVideoFramepackPipeline(
        transformer=transformer,
        image_encoder=seeded(lambda: SiglipVisionModel(config), seed=30),
        feature_extractor=SiglipImageProcessor(size={"height": 32, "width": 32}),
        **hunyuan_components(),
    )
    save(pipeline, folder)
    write_image(folder)


FAMILIES: Sequence[Family] = (
    Family(
        "ltx-video-i2v",
        "LTX-Video, image to video",
        write_ltx_image,
        call={"image": IMAGE, "height": 128, "width": 128, "num_frames": 9},
    ),
    Family(
        "framepack",
        "FramePack (HunyuanVideo)",
        write_framepack,
        call={**SIZE, "image": IMAGE, "latent_window_size": 2},
        note="the sample is a window; the pipeline joins the windows",
    ),
    Family("wan21-vace", "Wan 2.1 VACE", write_vace, call=SIZE, note=ACCELERATE),
    Family(
        "skyreels-v2",
        "SkyReels-V2, diffusion forcing",
        write_skyreels,
        call={**SIZE, "base_num_frames": 5},
        note=ACCELERATE,
    ),
    Family(
        "sana-video",
        "Sana-Video",
        write_sana_video,
        call={"height": SIDE, "width": SIDE, "frames": 5, "use_resolution_binning": False},
    ),
    Family("easyanimate", "EasyAnimate 5.1", write_easyanimate, call={**SIZE, "negative_prompt": ""}),
)
