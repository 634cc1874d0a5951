"""The prior of Stable Cascade, over very small latents.

Its decoder and all of Wuerstchen are not here: their folders name classes of ``diffusers.pipelines.wuerstchen``, and
diffusers 0.42 moved that module without leaving a way to load them.
"""

from pathlib import Path

from diffusers import DDPMWuerstchenScheduler, StableCascadePriorPipeline, StableCascadeUNet
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from family_models.family import Family
from family_models.folder import save
from family_models.stable_diffusion import image_processor, vision_config
from family_models.text import WIDTH, clip_projected, clip_tokenizer
from family_models.weights import seeded

BLOCK = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")


def write_prior(folder: Path) -> None:
    """``stabilityai/stable-cascade-prior``: tokens of the prompt, its pooled embedding and one of an image."""
    prior = seeded(
        lambda: StableCascadeUNet(
            in_channels=16,
            out_channels=16,
            timestep_ratio_embedding_dim=16,
            conditioning_dim=64,
            block_out_channels=(64, 64),
            num_attention_heads=(4, 4),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            block_types_per_layer=(BLOCK, BLOCK),
            clip_text_in_channels=WIDTH,
            clip_text_pooled_in_channels=WIDTH,
            clip_image_in_channels=WIDTH,
            switch_level=(False,),
        )
    )
    config = CLIPVisionConfig(**vision_config())
    pipeline = StableCascadePriorPipeline(
        prior=prior,
        text_encoder=clip_projected(),
        tokenizer=clip_tokenizer(),
        scheduler=DDPMWuerstchenScheduler(),
        feature_extractor=image_processor(),
        image_encoder=seeded(lambda: CLIPVisionModelWithProjection(config), seed=31),
        resolution_multiple=42.67,
    )
    save(pipeline, folder)


FAMILIES = (
    # A latent of the prior is 42.67 pixels wide.
    Family(
        "cascade-prior",
        "Stable Cascade prior",
        write_prior,
        call={"height": 341, "width": 341, "output_type": "pt"},
        note="draws latents [rows, 16, 8, 8]",
    ),
)
