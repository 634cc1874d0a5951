"""A model so small that a bundle of it is proven in seconds: guided by a prompt, with random weights."""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.compiler.chain import compile_model
from tfmq_export.config import CompileConfig, Thresholds
from tfmq_export.models.load import Source
from tfmq_export.models.model_pt import write_checkpoint
from tfmq_export.models.prompts import PromptSet

FLOORS = Thresholds(sqnr=12.0)
"""A network of random weights loses a little more to 4 bits than one that is trained: 14.8 dB, where those have 28."""

TOKENS, WIDTH, GUIDANCE, STEPS = 4, 8, 2.0, 4


def small_model(path: Path) -> Path:
    """Write a ``model.pt``: two levels, attention to a prompt on the second, images of 16 x 16."""
    torch.manual_seed(0)
    module = UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(WIDTH, 2 * WIDTH),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        attention_head_dim=WIDTH,
    )
    name = "encoder_hidden_states"
    prompts = PromptSet({name: torch.randn(4, TOKENS, WIDTH)}, {name: torch.zeros(TOKENS, WIDTH)}, GUIDANCE)
    write_checkpoint(path, module.eval(), dict(DDIMScheduler().config), prompts)
    return path


def small_bundle(model: Path, root: Path) -> Bundle:
    """Compile it at w4a8, so that there are packed weights and power-of-two scaling to break."""
    config = CompileConfig(preset="w4a8", effort="fast", calibration_images=2, validation_images=2, thresholds=FLOORS)
    return compile_model(Source(model, steps=STEPS), root, config).bundle
