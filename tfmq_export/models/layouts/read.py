"""Opening a layout: a denoiser of diffusers with its weights, its scheduler and whatever conditioning came along."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tfmq_export.errors import LoadError, first_line
from tfmq_export.models.folder import read_model_folder
from tfmq_export.models.layouts.find import Kind, Layout
from tfmq_export.models.layouts.latent_diffusion import read_latent_diffusion
from tfmq_export.models.layouts.opened import Opened
from tfmq_export.models.layouts.pixel_diffusion import read_pixel_diffusion
from tfmq_export.models.layouts.single_transformers import read_flux, read_sd3
from tfmq_export.models.model_pt import read_checkpoint

READERS = {
    Kind.LATENT_DIFFUSION: read_latent_diffusion,
    Kind.PIXEL_DIFFUSION: read_pixel_diffusion,
    Kind.SD3: read_sd3,
    Kind.FLUX: read_flux,
}
ELSEWHERE = ("first_stage_model.", "cond_stage_model.", "conditioner.", "vae.", "text_encoders.")


def read_layout(layout: Layout, scheduler: Mapping[str, Any] | None = None) -> Opened:
    """Load the denoiser of a layout.

    Args:
        scheduler: Configuration to take for a single file, in place of what the file and its neighbours say.
    Raises:
        LoadError: it cannot be read; says why and what next.
    """
    if layout.folder is not None:
        return read_model_folder(layout.folder)
    if layout.kind is Kind.PACKED:
        model, scheduler, prompts = read_checkpoint(layout.path)
        return Opened(model, scheduler, prompts)
    assert layout.state is not None, "single files have one"
    try:
        opened = READERS[layout.kind](layout.state, scheduler)
    except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError) as error:  # of shapes that make no sense
        raise LoadError(f"{layout.path}: not a {layout.kind} that diffusers can build: {first_line(error)}") from error
    if any(name.startswith(ELSEWHERE) for name in layout.state.tensors):
        return replace(opened, notes=(*opened.notes, "the denoiser alone, of a file with more"))
    return opened
