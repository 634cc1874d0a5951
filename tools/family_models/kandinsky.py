"""Kandinsky 2.2, whose prior draws an embedding of an image from a prompt, and Kandinsky 3."""

from pathlib import Path

from diffusers import (
    DDPMScheduler,
    Kandinsky3Pipeline,
    Kandinsky3UNet,
    KandinskyV22CombinedPipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from family_models.autoencoders import SIDE
from family_models.family import Family
from family_models.folder import save
from family_models.stable_diffusion import image_processor, vision_config
from family_models.text import WIDTH, clip_projected, clip_tokenizer, t5_encoder, t5_tokenizer
from family_models.weights import seeded


def movq() -> VQModel:
    """The autoencoder: norms of the decoder take the latents (in 32 groups), and three halvings."""
    return seeded(
        lambda: VQModel(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=(*("DownEncoderBlock2D",) * 3, "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 3),
            latent_channels=4,
            vq_embed_dim=4,
            num_vq_embeddings=32,
            norm_num_groups=32,
            norm_type="spatial",
            layers_per_block=1,
        ),
        seed=20,
    )


def prior_parts() -> dict[str, object]:
    """``kandinsky-community/kandinsky-2-2-prior``: a transformer over one embedding, the prompt and its tokens."""
    prior = seeded(
        lambda: PriorTransformer(
            num_attention_heads=4, attention_head_dim=16, num_layers=2, embedding_dim=WIDTH, num_embeddings=77
        ),
        seed=1,
    )
    config = CLIPVisionConfig(**vision_config())
    return {
        "prior": prior,
        "image_encoder": seeded(lambda: CLIPVisionModelWithProjection(config), seed=31),
        "text_encoder": clip_projected(),
        "tokenizer": clip_tokenizer(),
        "scheduler": UnCLIPScheduler(clip_sample_range=5.0, prediction_type="sample", variance_type="fixed_small_log"),
        "image_processor": image_processor(),
    }


def decoder_unet() -> UNet2DConditionModel:
    """Keys of the image's embedding beside those of the map, and four channels of variance."""
    return seeded(
        lambda: UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=8,
            block_out_channels=(32, 64),
            layers_per_block=2,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            attention_head_dim=16,
            cross_attention_dim=32,
            encoder_hid_dim=WIDTH,
            encoder_hid_dim_type="image_proj",
            addition_embed_type="image",
            resnet_time_scale_shift="scale_shift",
            norm_num_groups=8,
        )
    )


def write_22_prior(folder: Path) -> None:
    """The prior alone; it draws [rows, WIDTH], not a map."""
    save(KandinskyV22PriorPipeline(**prior_parts()), folder)


def write_22(folder: Path) -> None:
    """``kandinsky-2-2-prior`` and ``kandinsky-2-2-decoder``, saved as one pipeline."""
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="linear",
        variance_type="learned_range",
        clip_sample=False,
    )
    prior = {f"prior_{name}": part for name, part in prior_parts().items()}
    save(KandinskyV22CombinedPipeline(unet=decoder_unet(), scheduler=scheduler, movq=movq(), **prior), folder)


def write_3(folder: Path) -> None:
    """``kandinsky-community/kandinsky-3``: T5's tokens, pooled by attention into the embedding of time."""
    unet = seeded(
        lambda: Kandinsky3UNet(
            block_out_channels=(32, 64),
            layers_per_block=2,
            groups=8,
            attention_head_dim=16,
            time_embedding_dim=64,
            cross_attention_dim=64,
            encoder_hid_dim=WIDTH,
        )
    )
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True, variance_type="fixed_small")
    save(Kandinsky3Pipeline(t5_tokenizer(128), t5_encoder(), unet, scheduler, movq()), folder)


SIZE = {"height": SIDE, "width": SIDE}

FAMILIES = (
    Family(
        "kandinsky22",
        "Kandinsky 2.2",
        write_22,
        call={**SIZE, "prior_num_inference_steps": 3},
        note="two denoisers: prior_prior and unet",
    ),
    Family("kandinsky22-prior", "Kandinsky 2.2 prior", write_22_prior, call={"output_type": "pt"}),
    Family("kandinsky3", "Kandinsky 3", write_3, call=SIZE),
)
