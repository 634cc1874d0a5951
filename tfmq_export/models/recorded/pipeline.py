"""A pipeline of diffusers, loaded and run as it is: the code that calls a denoiser."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import load_image
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tfmq_export.bundle.pipeline_folder import find_components, read_index
from tfmq_export.capture.quiet import quiet_logger
from tfmq_export.errors import ConfigError, LoadError, first_line
from tfmq_export.models.layouts.folders import DENOISERS, needed_variant
from tfmq_export.models.quiet_loading import quiet_loading
from tfmq_export.models.recorded.memory import remember_encoders
from tfmq_export.models.recorded.requests import Request, with_pictures

LEFT_OUT = ("safety_checker", "watermark", "watermarker")
"""Components that look at finished pictures and would change them."""
LISTED = ("prompt", "negative_prompt", "class_labels", "image", "mask_image", "control_image")
"""Arguments of a pipeline that may be a list, one entry for each image."""
TOGETHER = 8  # images of one run; more rows make no core busier


@dataclass(frozen=True, slots=True, eq=False)
class PipelineCode:
    """Draws with a pipeline, one image for each seed.

    Attributes:
        requests: What to draw, in turn.
        common: Arguments of every call.
    """

    pipeline: Any
    requests: Sequence[Request]
    common: Mapping[str, object] = field(default_factory=dict)

    def __call__(self, seeds: Sequence[int], pictures: bool) -> Tensor:
        """Images, [N, ...]; latents as they are, pictures in -1..1, films as strips of their frames."""
        with torch.no_grad(), quiet_logger("diffusers"), quiet_logger("transformers"):
            return self._draw(seeds, pictures)

    def takes(self, name: str) -> bool:
        """Whether the pipeline has an argument of this name."""
        return name in parameters_of(self.pipeline)

    def _draw(self, seeds: Sequence[int], pictures: bool) -> Tensor:
        asked = [self.requests[seed % len(self.requests)] for seed in seeds] if self.requests else [{} for _ in seeds]
        if len(seeds) > 1 and not _alike(asked):
            return torch.cat([self._draw([seed], pictures) for seed in seeds])
        options = {**self.common, **_joined(asked), "generator": _generators(seeds)}
        if self.takes("batch_size") and not self.takes("prompt"):
            options["batch_size"] = len(seeds)
        if not self.takes("output_type") or "output_type" in options:
            return _images(self.pipeline(**options))
        try:
            return _images(self.pipeline(**options, output_type="np" if pictures else "latent"))
        except ValueError as error:
            if pictures or "output_type" not in str(error):
                raise
            return _images(self.pipeline(**options, output_type="np"))  # it works on pictures, not on latents


def open_pipeline(root: Path, variant: str | None = None, **components: object) -> Any:
    """Load a pipeline folder; nothing in it is executed and nothing fetched.

    Args:
        variant: Of the weights, as "fp16", for the components that have it; by default the one that some have alone.
        components: Those that are loaded already, by name.
    Raises:
        LoadError: names the component that is missing or cannot be loaded.
    """
    index = read_index(root)
    _require_known_libraries(index, root)
    if not (root / "config.json").is_file():  # else an early release, with all components in the root
        find_components(root)
    variant = variant or needed_variant(root)
    absent = {name: None for name in LEFT_OUT if name in index}
    extra = {"requires_safety_checker": False} if "requires_safety_checker" in index else {}
    try:
        with quiet_loading():
            pipeline: Any = DiffusionPipeline.from_pretrained(
                root,
                local_files_only=True,
                use_safetensors=True,
                variant=variant,
                **absent,
                **extra,
                **components,
            )
    except ImportError as error:
        raise LoadError(f"{root}: {first_line(error)}; install it, or tfmq-export[pipelines]") from error
    except Exception as error:  # each component's own loader, which may raise anything
        where = next((path for path in sorted(root.rglob("*.safetensors")) if not _is_readable(path)), root)
        raise LoadError(f"{where}: cannot load the pipeline: {first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_modules(**components)  # optional ones are loaded again, whatever was given
    remember_encoders(pipeline)
    if getattr(pipeline, "watermark", None) is not None:
        pipeline.watermark = None
    return pipeline


def denoiser_name(root: Path) -> str:
    """The component of a pipeline that is run at every step.

    Raises:
        LoadError: there is none of the known names.
    """
    index = read_index(root)
    found = [name for name in DENOISERS if isinstance(index.get(name), list) and index[name][:1] != [None]]
    if not found:
        raise LoadError(
            f"{root}: {index.get('_class_name')} has none of {', '.join(DENOISERS)}; give the model with --factory"
        )
    return found[0]


def missing_parts(root: Path) -> tuple[str, ...]:
    """What a pipeline's class needs and its index does not list: such a folder holds a denoiser, and no pipeline."""
    index = read_index(root)
    with quiet_loading():  # which imports the class's own libraries
        found = getattr(diffusers, str(index.get("_class_name")), None)
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        return ()
    known: Any = found
    needed = {
        name
        for name, given in inspect.signature(known.__init__).parameters.items()
        if given.default is inspect.Parameter.empty and given.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    }
    return tuple(sorted(needed - {"self"} - index.keys() - set(known._optional_components)))


def class_in_pipeline(name: str, where: str | Path) -> Any:
    """A model class of diffusers by its name.

    Raises:
        LoadError: the installed diffusers has none.
    """
    known = getattr(diffusers, name, None)
    if not (isinstance(known, type) and issubclass(known, nn.Module)):
        raise LoadError(f"{where}: diffusers {diffusers.__version__} has no model {name!r}; use --factory")
    return known


def parameters_of(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """What a pipeline may be called with, by name."""
    return inspect.signature(pipeline.__call__).parameters


def call_arguments(pipeline: Any, steps: int) -> dict[str, object]:
    """What every call of a pipeline is given."""
    known = parameters_of(pipeline)
    return {"num_inference_steps": steps} if "num_inference_steps" in known else {}


def require_requests(pipeline: Any, requests: Sequence[Request], where: str) -> None:
    """Refuse what a pipeline cannot be asked, before it runs.

    Raises:
        ConfigError: an argument that it does not take, or one that it needs and no request has.
    """
    known = parameters_of(pipeline)
    for request in requests:
        if strange := sorted(request.keys() - known.keys()):
            raise ConfigError(
                f"{where}: {type(pipeline).__name__} takes no {', '.join(strange)}; it takes {', '.join(known)}"
            )
    needed = [name for name, given in known.items() if given.default is inspect.Parameter.empty and name != "kwargs"]
    missing = [name for name in needed if requests and not all(name in request for request in requests)]
    if missing or (needed and not requests):
        lacking = missing or needed
        raise ConfigError(
            f"{where}: {type(pipeline).__name__} needs {', '.join(lacking)} for every image; {_advice(known, lacking)}"
        )


def pictures_not_given(code: PipelineCode) -> str:
    """Advice where a pipeline that may take pictures was given none; else nothing."""
    known = parameters_of(code.pipeline)
    given = {name for request in code.requests for name in request}
    lacking = [name for name in ("image", "mask_image") if name in known and name not in given]
    return f"if it needs {' and '.join(lacking)}, {_advice(known, lacking)}" if lacking else ""


def _advice(known: Collection[str], lacking: Sequence[str]) -> str:
    names = [name for name in dict.fromkeys(("prompt", *lacking)) if name in known]
    example = ", ".join(f'"{name}": {_example(name)}' for name in names)
    return f"give --prompts FILE with JSON lines of its call arguments, such as {{{example}}}"


def _example(name: str) -> str:
    return '"a red fox in snow"' if name == "prompt" else f'"{name}.png"' if "image" in name else "..."


def _require_known_libraries(index: Mapping[str, Any], root: Path) -> None:
    """The index names modules to import: none but the two libraries and diffusers' own pipelines."""
    if not isinstance(index.get("_class_name"), str):
        raise LoadError(f"{root}: its pipeline is code of its own, which is not run; use --factory with that code")
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):
            continue
        library = value[0] if value else None
        own = isinstance(library, str) and library.isidentifier() and hasattr(diffusers.pipelines, library)
        if library not in (None, "diffusers", "transformers") and not own:
            raise LoadError(
                f"{root}: component {name} comes from {library!r}, which is neither diffusers nor transformers"
            )


def _is_readable(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _alike(asked: Sequence[Request]) -> bool:
    """Whether requests can be drawn together: they differ in nothing but what may be a list."""
    rest = [without_lists(request) for request in asked]
    return all(each == rest[0] for each in rest) and all(request.keys() == asked[0].keys() for request in asked)


def without_lists(request: Request) -> dict[str, object]:
    """What of a request must be the same for images that are drawn together."""
    return {key: value for key, value in request.items() if key not in LISTED}


def _joined(asked: Sequence[Request]) -> dict[str, object]:
    joined: dict[str, object] = {}
    opened = [with_pictures(request, _opened) for request in asked]
    for key in opened[0]:
        values = [request[key] for request in opened]
        joined[key] = values if key in LISTED and (len(values) > 1 or key == "class_labels") else values[0]
    return joined


def _opened(path: str) -> object:
    """A picture for its path."""
    return load_image(path) if Path(path).is_file() else path


def _generators(seeds: Sequence[int]) -> Any:
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    return made if len(made) > 1 else made[0]


def _images(result: Any) -> Tensor:
    """What a pipeline returned, as tensors: latents, or pictures in -1..1, [N, ...]."""
    drawn = result[0]
    if isinstance(drawn, Tensor):
        return drawn.detach().float().cpu()
    if isinstance(drawn, list) and drawn and isinstance(drawn[0], Tensor):
        return torch.stack(drawn).detach().float().cpu()
    array: NDArray[Any] = np.stack([np.asarray(each, np.float32) for each in drawn])
    if isinstance(drawn, list) and not isinstance(drawn[0], np.ndarray):
        array = array / 255  # pictures of PIL
    if array.ndim == 5:  # films, [N, F, H, W, C]: strips of their frames
        array = array.reshape(len(array), -1, *array.shape[3:])
    if array.ndim == 4 and array.shape[-1] in (1, 3, 4):
        array = array.transpose(0, 3, 1, 2) * 2 - 1
    return torch.from_numpy(np.ascontiguousarray(array))
