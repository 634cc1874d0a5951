"""AuraFlow: double and single blocks over learned positions, conditioned by UMT5."""

from pathlib import Path

from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from family_models.autoencoders import SIDE, image_autoencoder
from family_models.family import Family
from family_models.folder import save
from family_models.text import WIDTH, llama_tokenizer, umt5_encoder
from family_models.weights import seeded


def write_aura_flow(folder: Path) -> None:
    """``fal/AuraFlow``."""
    transformer = seeded(
        lambda: AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            caption_projection_dim=64,
            pos_embed_max_size=64,
        )
    )
    pipeline = AuraFlowPipeline(
        tokenizer=llama_tokenizer(),
        text_encoder=umt5_encoder(),
        vae=image_autoencoder(scaling=0.13025),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    save(pipeline, folder)


FAMILIES = (Family("auraflow", "AuraFlow", write_aura_flow, call={"height": SIDE, "width": SIDE}),)
