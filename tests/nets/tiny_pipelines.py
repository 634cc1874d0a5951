"""Pipelines of diffusers with random weights, small enough to build in a test; nothing is downloaded."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 16
TOKENS = 8


def stable_diffusion(folder: Path, scheduler: SchedulerMixin) -> Path:
    """A text encoder, a VAE and a U-Net, as ``StableDiffusionPipeline`` has them."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
    )
    text = CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer(folder.with_name("vocabulary")),
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    for file in folder.with_name("vocabulary").iterdir():  # as published pipelines have them; older readers need them
        shutil.copyfile(file, folder / "tokenizer" / file.name)
    return folder


def dit(folder: Path, scheduler: SchedulerMixin) -> Path:
    """A class-conditional transformer that predicts variances too."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,  # DiTPipeline's empty class is 1000
    )
    for block in transformer.transformer_blocks:  # they start closed, and would predict nothing of the sample
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.3)
    DiTPipeline(transformer=transformer.eval(), vae=vae(), scheduler=scheduler).save_pretrained(folder)
    return folder


def unconditional(folder: Path) -> Path:
    """Pixels, no prompt."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    DDIMPipeline(unet=unet.eval(), scheduler=DDIMScheduler()).save_pretrained(folder)
    return folder


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


VOCABULARY = ["<|startoftext|>", "<|endoftext|>", "a", "c", "t", "a</w>", "t</w>", "ca", "cat</w>", "o</w>"]


def tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's own, over a vocabulary of ten tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({token: index for index, token in enumerate(VOCABULARY)}))
    merges.write_text("#version: 0.2\nc a\nca t</w>\n")
    return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=TOKENS)


def prompt_file(pipeline: StableDiffusionPipeline, path: Path, prompts: list[str]) -> Path:
    """What ``--conditioning`` takes: embeddings of the prompts and of the empty one."""
    given, empty = pipeline.encode_prompt(prompts, "cpu", 1, True)
    save_file({"encoder_hidden_states": given, "encoder_hidden_states.unconditional": empty[0].contiguous()}, path)
    return path
