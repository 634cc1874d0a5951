"""Shap-E: what is denoised are tokens, not an image."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import HeunDiscreteScheduler, PriorTransformer, ShapEPipeline
from diffusers.pipelines.shap_e.renderer import ShapERenderer

from family_models.family import Family
from family_models.folder import save
from family_models.text import WIDTH, clip_projected, clip_tokenizer
from family_models.weights import seeded


def write_shap_e(folder: Path) -> None:
    """``openai/shap-e``: tokens that are the weights of a field of colours, by Heun's method."""
    prior = seeded(
        lambda: PriorTransformer(
            num_attention_heads=4,
            attention_head_dim=16,
            num_layers=2,
            embedding_dim=32,
            num_embeddings=16,
            additional_embeddings=0,
            time_embed_act_fn="gelu",
            norm_in_type="layer",
            encoder_hid_proj_type=None,
            added_emb_type=None,
            time_embed_dim=64,
            embedding_proj_dim=WIDTH,
            clip_embed_dim=64,
        )
    )
    hidden = 4
    renderer = seeded(
        lambda: ShapERenderer(
            param_shapes=((hidden, 93), (hidden, hidden), (hidden, hidden), (hidden, hidden)),
            d_latent=32,
            d_hidden=hidden,
            n_output=12,
        ),
        seed=21,
    )
    pipeline = ShapEPipeline(
        prior=prior,
        text_encoder=clip_projected(),
        tokenizer=clip_tokenizer(),
        scheduler=HeunDiscreteScheduler(
            beta_schedule="exp",
            num_train_timesteps=1024,
            prediction_type="sample",
            use_karras_sigmas=True,
            clip_sample=True,
            clip_sample_range=1.0,
        ),
        shap_e_renderer=renderer,
    )
    save(pipeline, folder)


FAMILIES: Sequence[Family] = (
    Family(
        "shap-e",
        "Shap-E",
        write_shap_e,
        call={"output_type": "latent"},
        note="no images: the renderer takes 20 views of thousands of rays, and is left out",
    ),
)
