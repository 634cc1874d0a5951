"""Denoisers of other things than images alone: UniDiffuser (image and text at once) and aMUSEd (tokens)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AmusedPipeline,
    AmusedScheduler,
    DPMSolverMultistepScheduler,
    UniDiffuserModel,
    UniDiffuserPipeline,
    UniDiffuserTextDecoder,
    UVit2DModel,
    VQModel,
)
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, GPT2Tokenizer

from family_models.autoencoders import SIDE, image_autoencoder
from family_models.family import Family
from family_models.folder import save
from family_models.stable_diffusion import BETAS, image_processor, vision_config
from family_models.text import WIDTH, byte_pairs, clip_encoder, clip_projected, clip_tokenizer
from family_models.weights import seeded

CODES = 64


def write_unidiffuser(folder: Path) -> None:
    """``thu-ml/unidiffuser-v1``: latents, an embedding of the image and one of the text, a timestep for each kind."""
    vocabulary, merges = byte_pairs(("<|endoftext|>", "<|EOS|>"))
    unet = seeded(
        lambda: UniDiffuserModel(
            text_dim=32,
            clip_img_dim=WIDTH,
            num_text_tokens=77,
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_bias=False,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu",
            num_embeds_ada_norm=1000,
            norm_type="layer_norm",
            block_type="unidiffuser",
            pre_layer_norm=False,
            norm_elementwise_affine=False,
            use_patch_pos_embed=False,
            ff_final_dropout=True,
            use_data_type_embedding=True,
        )
    )
    decoder = seeded(
        lambda: UniDiffuserTextDecoder(
            prefix_length=77,
            prefix_inner_dim=WIDTH,
            prefix_hidden_dim=32,
            vocab_size=len(vocabulary),
            n_positions=256,
            n_embd=32,
            n_layer=2,
            n_head=2,
        ),
        seed=21,
    )
    head = decoder.transformer.lm_head  # tied to the embeddings, and safetensors stores no tensor twice
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    pipeline = UniDiffuserPipeline(
        vae=image_autoencoder(),
        text_encoder=clip_encoder(),
        image_encoder=seeded(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**vision_config())), seed=30),
        clip_image_processor=image_processor(),
        clip_tokenizer=clip_tokenizer(),
        text_decoder=decoder,
        text_tokenizer=GPT2Tokenizer(vocabulary, merges, eos_token="<|EOS|>"),
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(**BETAS, solver_order=3),
    )
    save(pipeline, folder)


def write_amused(folder: Path) -> None:
    """``amused/amused-256``: integers in, logits of every code out; each step fills in some of the masked ones."""
    transformer = seeded(
        lambda: UVit2DModel(
            hidden_size=64,
            cond_embed_dim=WIDTH,
            micro_cond_encode_dim=8,
            micro_cond_embed_dim=40,
            encoder_hidden_size=WIDTH,
            vocab_size=CODES + 1,
            codebook_size=CODES,
            in_channels=32,
            block_out_channels=32,
            num_res_blocks=1,
            block_num_heads=2,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            sample_size=8,
        )
    )
    autoencoder = seeded(
        lambda: VQModel(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=8,
            layers_per_block=1,
            norm_num_groups=4,
            num_vq_embeddings=CODES,
            sample_size=SIDE,
            mid_block_add_attention=False,
            lookup_from_codebook=True,
        ),
        seed=20,
    )
    pipeline = AmusedPipeline(
        vqvae=autoencoder,
        tokenizer=clip_tokenizer(),
        text_encoder=clip_projected(),
        transformer=transformer,
        scheduler=AmusedScheduler(mask_token_id=CODES),
    )
    save(pipeline, folder)


FAMILIES: Sequence[Family] = (
    Family("unidiffuser", "UniDiffuser", write_unidiffuser, note="the sample is an image and an embedding in one row"),
    Family("amused", "aMUSEd", write_amused, note="no continuous noise: the sample is integers"),
)
