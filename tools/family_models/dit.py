"""DiT: class labels instead of prompts, four channels of noise and four of variance."""

from pathlib import Path

from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, Transformer2DModel

from family_models.autoencoders import image_autoencoder
from family_models.family import Family
from family_models.folder import save
from family_models.weights import seeded

OPTIONS = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
LABELS = {0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus", 207: "golden retriever", 281: "tabby, tabby cat"}


def write_dit(folder: Path) -> None:
    """By the class that diffusers has for it now."""
    _write(folder, seeded(lambda: DiTTransformer2DModel(**OPTIONS)))


def write_published_dit(folder: Path) -> None:
    """``facebook/DiT-XL-2-256``: by the class of all early transformers. diffusers loads it as the one of today."""
    _write(folder, seeded(lambda: Transformer2DModel(**OPTIONS)))


def _write(folder: Path, transformer: DiTTransformer2DModel | Transformer2DModel) -> None:
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    save(DiTPipeline(transformer, image_autoencoder(), scheduler), folder, {"id2label": LABELS})


FAMILIES = (
    Family("dit", "DiT-XL/2", write_dit, call={"class_labels": [207]}),
    Family("dit-published", "DiT-XL/2, the published class", write_published_dit, call={"class_labels": [207]}),
)
