"""Video by transformers: Wan, CogVideoX, LTX-Video, HunyuanVideo and others. Two latent frames of 8 x 8 at most."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LattePipeline,
    LatteTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    SchedulerMixin,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from transformers import CLIPVisionConfig, CLIPVisionModel

from family_models.autoencoders import SIDE, image_autoencoder
from family_models.family import Family
from family_models.folder import save
from family_models.images import IMAGE, write_image
from family_models.stable_diffusion import image_processor, vision_config
from family_models.text import WIDTH, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer
from family_models.video_text import llava_encoder, llava_tokenizer, umt5_encoder
from family_models.weights import seeded

FRAMES = 5
"""Two latent ones, where four frames share one and the first has its own."""
SIZE = {"height": SIDE, "width": SIDE, "num_frames": FRAMES}


def wan_autoencoder() -> AutoencoderKLWan:
    """Wan 2.1's: causal convolutions that keep what they saw of earlier frames."""
    return seeded(lambda: AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1), seed=20)


def wan_transformer(seed: int = 0, **changes: object) -> WanTransformer3DModel:
    """Cross-attention to 512 tokens, rotary positions over three axes, norms over all heads."""
    options: dict[str, object] = {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "text_dim": WIDTH,
        "freq_dim": 32,
        "ffn_dim": 128,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return seeded(lambda: WanTransformer3DModel(**{**options, **changes}), seed)


def wan_components(shift: float = 3.0) -> dict[str, object]:
    """What every Wan has beside its transformers."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    return {
        "vae": wan_autoencoder(),
        "text_encoder": umt5_encoder(),
        "tokenizer": t5_tokenizer(),
        "scheduler": scheduler,
    }


def write_wan(folder: Path) -> None:
    """``Wan-AI/Wan2.1-T2V-1.3B-Diffusers``."""
    save(WanPipeline(transformer=wan_transformer(), **wan_components()), folder)


def write_wan_image(folder: Path) -> None:
    """``Wan-AI/Wan2.1-I2V-14B-480P-Diffusers``: latents of the image and a mask beside the sample."""
    config = CLIPVisionConfig(**{**vision_config(), "hidden_size": 64, "num_hidden_layers": 3})
    pipeline = WanImageToVideoPipeline(
        transformer=wan_transformer(in_channels=36, image_dim=64, added_kv_proj_dim=64),
        image_encoder=seeded(lambda: CLIPVisionModel(config), seed=30),
        image_processor=image_processor(),
        **wan_components(),
    )
    save(pipeline, folder)
    write_image(folder)


def write_wan_two(folder: Path) -> None:
    """``Wan-AI/Wan2.2-T2V-A14B-Diffusers``: one transformer for the noisy steps, another for the rest."""
    pipeline = WanPipeline(
        transformer=wan_transformer(), transformer_2=wan_transformer(1), boundary_ratio=0.875, **wan_components()
    )
    save(pipeline, folder)


def write_wan_small(folder: Path) -> None:
    """``Wan-AI/Wan2.2-TI2V-5B-Diffusers``: a timestep for every token, latents a sixteenth of the image's side."""
    autoencoder = seeded(
        lambda: AutoencoderKLWan(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=48,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
            latents_mean=[0.0] * 48,
            latents_std=[1.0] * 48,
        ),
        seed=20,
    )
    pipeline = WanPipeline(
        transformer=wan_transformer(in_channels=48, out_channels=48),
        expand_timesteps=True,
        **{**wan_components(5.0), "vae": autoencoder},
    )
    save(pipeline, folder)


def cogvideox_autoencoder() -> AutoencoderKLCogVideoX:
    """Norms that read the latents again at every level of the decoder."""
    return seeded(
        lambda: AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            sample_height=SIDE,
            sample_width=SIDE,
        ),
        seed=20,
    )


def cogvideox_transformer(**changes: object) -> CogVideoXTransformer3DModel:
    """Text and video in one stream."""
    options: dict[str, object] = {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "time_embed_dim": 32,
        "text_embed_dim": WIDTH,
        "num_layers": 2,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": FRAMES,
    }
    return seeded(lambda: CogVideoXTransformer3DModel(**{**options, **changes}))


def cogvideox_components(scheduler: SchedulerMixin) -> dict[str, object]:
    """What every CogVideoX has beside its transformer."""
    return {
        "tokenizer": t5_tokenizer(226),
        "text_encoder": t5_encoder(),
        "vae": cogvideox_autoencoder(),
        "scheduler": scheduler,
    }


COGVIDEOX_STEPS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def write_cogvideox2(folder: Path) -> None:
    """``THUDM/CogVideoX-2b``: positions are added."""
    scheduler = CogVideoXDDIMScheduler(**COGVIDEOX_STEPS, snr_shift_scale=3.0)
    save(CogVideoXPipeline(transformer=cogvideox_transformer(), **cogvideox_components(scheduler)), folder)


def write_cogvideox5(folder: Path) -> None:
    """``THUDM/CogVideoX-5b``: rotary positions, handed in by the pipeline."""
    scheduler = CogVideoXDPMScheduler(**COGVIDEOX_STEPS, snr_shift_scale=1.0)
    transformer = cogvideox_transformer(use_rotary_positional_embeddings=True)
    save(CogVideoXPipeline(transformer=transformer, **cogvideox_components(scheduler)), folder)


def write_cogvideox_image(folder: Path) -> None:
    """``THUDM/CogVideoX-5b-I2V``: latents of the image beside the sample, learned positions beside rotary ones."""
    scheduler = CogVideoXDPMScheduler(**COGVIDEOX_STEPS, snr_shift_scale=1.0)
    transformer = cogvideox_transformer(
        in_channels=32, use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True
    )
    save(CogVideoXImageToVideoPipeline(transformer=transformer, **cogvideox_components(scheduler)), folder)
    write_image(folder)


def ltx_components() -> dict[str, object]:
    """What every LTX-Video is: latents of 128 channels, 32 pixels and 8 frames to one."""
    transformer = seeded(
        lambda: LTXVideoTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            cross_attention_dim=64,
            num_layers=2,
            caption_channels=WIDTH,
        )
    )
    autoencoder = seeded(
        lambda: AutoencoderKLLTXVideo(
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        ),
        seed=20,
    )
    return {
        "scheduler": dynamic_flow(max_shift=2.05, base_shift=0.95, max_image_seq_len=4096, shift_terminal=0.1),
        "vae": autoencoder,
        "text_encoder": t5_encoder(),
        "tokenizer": t5_tokenizer(128),
        "transformer": transformer,
    }


def write_ltx(folder: Path) -> None:
    """``Lightricks/LTX-Video``: sizes go into the denoiser as numbers."""
    save(LTXPipeline(**ltx_components()), folder)


def dynamic_flow(**options: object) -> FlowMatchEulerDiscreteScheduler:
    """A flow whose timesteps shift with the number of tokens."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **options)


HUNYUAN = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "rope_axes_dim": (4, 6, 6),
}


def hunyuan_components() -> dict[str, object]:
    """What every HunyuanVideo has beside its transformer."""
    tokenizer = llava_tokenizer(DEFAULT_PROMPT_TEMPLATE["template"])
    autoencoder = seeded(
        lambda: AutoencoderKLHunyuanVideo(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4), seed=20
    )
    return {
        "text_encoder": llava_encoder(tokenizer),
        "tokenizer": tokenizer,
        "vae": autoencoder,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder_2": clip_encoder(),
        "tokenizer_2": clip_tokenizer(),
    }


def write_hunyuan_video(folder: Path) -> None:
    """``hunyuanvideo-community/HunyuanVideo``: double and single blocks, a refiner of the text, embedded guidance."""
    transformer = seeded(lambda: HunyuanVideoTransformer3DModel(**HUNYUAN))
    save(HunyuanVideoPipeline(transformer=transformer, **hunyuan_components()), folder)


def write_mochi(folder: Path) -> None:
    """``genmo/mochi-1-preview``: learned frequencies of its rotary positions, text narrower than video."""
    transformer = seeded(
        lambda: MochiTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            num_layers=2,
            pooled_projection_dim=32,
            text_embed_dim=WIDTH,
            time_embed_dim=32,
        )
    )
    autoencoder = seeded(
        lambda: AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        seed=20,
    )
    pipeline = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=autoencoder,
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(256),
        transformer=transformer,
        force_zeros_for_empty_prompt=True,
    )
    save(pipeline, folder)


def write_allegro(folder: Path) -> None:
    """``rhymes-ai/Allegro``."""
    transformer = seeded(
        lambda: AllegroTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=24,
            num_layers=2,
            cross_attention_dim=96,
            sample_height=8,
            sample_width=8,
            sample_frames=2,
            caption_channels=WIDTH,
        )
    )
    autoencoder = seeded(
        lambda: AutoencoderKLAllegro(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=SIDE
        ),
        seed=20,
    )
    pipeline = AllegroPipeline(
        tokenizer=t5_tokenizer(512),
        text_encoder=t5_encoder(),
        vae=autoencoder,
        transformer=transformer,
        scheduler=EulerAncestralDiscreteScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear", timestep_spacing="linspace"
        ),
    )
    save(pipeline, folder)


def write_latte(folder: Path) -> None:
    """``maxin-cn/Latte-1``: blocks over space and over time take turns; four channels of noise, four of variance."""
    transformer = seeded(
        lambda: LatteTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=64,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=WIDTH,
            video_length=2,
        )
    )
    pipeline = LattePipeline(
        tokenizer=t5_tokenizer(120),
        text_encoder=t5_encoder(),
        vae=image_autoencoder(),
        transformer=transformer,
        scheduler=DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False),
    )
    save(pipeline, folder)


ACCELERATE = "diffusers loads it only where accelerate is installed"
FAMILIES: Sequence[Family] = (
    Family("wan21", "Wan 2.1, text to video", write_wan, call=SIZE, note=ACCELERATE),
    Family(
        "wan21-i2v",
        "Wan 2.1, image to video",
        write_wan_image,
        call={**SIZE, "image": IMAGE},
        note=f"{ACCELERATE}; it calls ftfy",
    ),
    Family(
        "wan22",
        "Wan 2.2, text to video",
        write_wan_two,
        call=SIZE,
        note=f"two denoisers, parted by the timestep; {ACCELERATE}",
    ),
    Family("wan22-ti2v", "Wan 2.2, 5B", write_wan_small, call=SIZE, note=f"a timestep for every token; {ACCELERATE}"),
    Family("cogvideox-2b", "CogVideoX 2B", write_cogvideox2),
    Family("cogvideox-5b", "CogVideoX 5B", write_cogvideox5),
    Family(
        "cogvideox-5b-i2v",
        "CogVideoX 5B, image to video",
        write_cogvideox_image,
        call={"image": IMAGE, "num_frames": FRAMES},
    ),
    Family("ltx-video", "LTX-Video", write_ltx, call={"height": 128, "width": 128, "num_frames": 9}),
    Family("hunyuan-video", "HunyuanVideo", write_hunyuan_video, call=SIZE),
    Family("mochi", "Mochi 1", write_mochi, call={**SIZE, "num_frames": 7}),
    Family(
        "allegro",
        "Allegro",
        write_allegro,
        call={**SIZE, "output_type": "latent"},
        note="its decoder works in tiles alone, which a user turns on by a call: here it is left out",
    ),
    Family("latte", "Latte", write_latte, call={"height": SIDE, "width": SIDE, "video_length": 2}),
)
