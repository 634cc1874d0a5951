"""From a model and the code that draws with it to a ``Denoiser``."""

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tfmq_export.bundle.manifest import SamplerInfo
from tfmq_export.bundle.pictures import is_picture
from tfmq_export.capture.denoiser import Denoiser, first_tensor, row_shape
from tfmq_export.errors import ConfigError, LoadError, first_line
from tfmq_export.models.folder import read_weights
from tfmq_export.models.layouts.folders import ModelFolder
from tfmq_export.models.layouts.lora import LoraFile, fuse
from tfmq_export.models.layouts.opened import Opened, noted
from tfmq_export.models.recorded.calls import CallPlan, FlatModule, flat_module, signature_of
from tfmq_export.models.recorded.pipeline import (
    TOGETHER,
    PipelineCode,
    call_arguments,
    class_in_pipeline,
    denoiser_name,
    open_pipeline,
    parameters_of,
    pictures_not_given,
    require_requests,
    without_lists,
)
from tfmq_export.models.recorded.record import DrawSeeds, RecordedSampler, Recorder, call_info, image_of, is_close
from tfmq_export.models.recorded.requests import Request, own_prompts
from tfmq_export.models.recorded.roles import Drawing, RecordedRun, plan_of
from tfmq_export.models.schedulers import choose_scheduler, scheduler_config
from tfmq_export.models.single_precision import in_single_precision
from tfmq_export.models.walk import LEARNED
from tfmq_export.recipe.timesteps import TimestepSet

Draw = Callable[[int], Any]
"""The user's own sampler: ``draw(seed) -> image``, with the module inside."""
TELLING = 3
"""Steps of a run that shows what changes from call to call."""
EXAMPLES = 8
"""Rows of conditioning to keep as examples."""
MANY_STEPS = "DDPMScheduler"
"""Needs about a thousand steps; asked for fewer, its noise schedule is walked by DDIM."""


def denoiser_from_draw(module: nn.Module, draw: Draw, steps: int | None, where: str) -> Denoiser:
    """Record a module in the user's own sampler.

    Args:
        draw: A ``Drawing`` tells sample and timestep itself.
    Raises:
        LoadError: the sampler raises, never calls the module, or calls it in a way that no graph can take.
        ConfigError: ``steps`` is not what the sampler does; or the seed says nothing.
    """
    if "forward" in module.__dict__:
        raise ConfigError(f"{where}: forward is set on the module itself; put it into its class, or wrap the module")
    if any(value.device.type != "cpu" for value in module.parameters()):
        raise ConfigError(
            f"{where}: the module is not on the CPU; leave it there, --device moves it while it quantizes"
        )
    module = in_single_precision(module)

    def code(seeds: Sequence[int], pictures: bool) -> Tensor:
        return torch.stack([image_of(draw(seed), where) for seed in seeds])

    seen: list[Tensor] = []

    def noting(seeds: Sequence[int], pictures: bool) -> Tensor:
        seen.append(code(seeds, pictures))
        return seen[-1]

    recorder = Recorder(module, noting, where)
    runs = [recorder.run([seed]) for seed in (0, 0, 1)]
    plan = plan_of(signature_of(module), runs[1:], where, draw if isinstance(draw, Drawing) else None)
    _require_seeded(plan, runs, where)
    sample = runs[1].calls[0][plan.inputs[plan.sample].path]
    recorder = replace(recorder, draw=_as_data(code, seen, sample.shape[1:]))
    denoiser = _denoiser(recorder, plan, runs[1:], runs[1], together=1)
    visited = len(denoiser.timesteps)
    if steps is not None and steps != visited:
        raise ConfigError(f"--steps {steps}, but draw() visits {visited} timesteps; set them in its own code")
    return replace(denoiser, sampler_info=SamplerInfo("function", visited))


def _as_data(code: DrawSeeds, seen: Sequence[Tensor], row: Sequence[int]) -> DrawSeeds:
    """Code whose images are data as the model has them.

    Args:
        seen: What it drew, [1, ...] each. Pictures from 0, black, to 1, as PIL has them, become -1..1.
        row: Shape of a sample. A signal in a batch of one, [1, C, L], would be taken for a picture of one channel.
    """
    batched = all(images.shape[1:] == (1, *row) for images in seen)
    shape = (1, *row) if batched else seen[0].shape
    from_black = is_picture(shape) and all(float(x.min()) >= 0 and float(x.max()) <= 1 for x in seen)

    def data(seeds: Sequence[int], pictures: bool) -> Tensor:
        images = code(seeds, pictures)
        images = images[:, 0] if batched else images
        return 2 * images - 1 if from_black else images

    return data


def denoiser_from_pipeline(  # noqa: PLR0913
    folder: ModelFolder,
    steps: int,
    *,
    requests: Sequence[Request] = (),
    guidance_scale: float | None = None,
    scheduler: str | None = None,
    loras: Sequence[LoraFile] = (),
    given: Opened | None = None,
    where: str,
) -> Denoiser:
    """Record the denoiser of a pipeline folder while the pipeline runs.

    Args:
        requests: What to draw, in turn; if none, the package's own prompts where the pipeline takes a prompt.
        scheduler: As ``choose_scheduler`` takes it; None keeps the pipeline's own.
        loras: Files to fuse into the denoiser's weights.
        given: A denoiser to run in the place of the folder's own.
    Raises:
        LoadError: a component cannot be loaded, the pipeline raises, or no graph can take its calls.
        ConfigError: the pipeline takes no such argument, or its scheduler cannot be walked.
    """
    root = folder.root
    name = denoiser_name(root)
    module, notes = read_weights(folder, class_in_pipeline) if given is None else (given.model, given.notes)
    where = noted(where, (*notes, *(fuse(module, lora) for lora in loras)))
    module = in_single_precision(module)
    pipeline = open_pipeline(root, folder.variant, **{name: module})
    chosen = _scheduler(pipeline, scheduler, steps, where)
    config: Any = module.config
    code = PipelineCode(pipeline, requests, call_arguments(pipeline, steps))
    asked = _guided(tuple(requests) or _usual_requests(code, config), guidance_scale)
    code = replace(code, requests=asked)
    require_requests(pipeline, asked, where)
    runs, plan, together = _recorded(Recorder(module, _of_more_steps(code), where))
    schedule = runs[0] if steps >= TELLING else Recorder(module, code, where).run([0], images=1)
    _require_one_schedule(Recorder(module, code, where), plan, schedule, asked)
    if any(leaf.ragged for leaf in plan.leaves):
        together = 1  # prompts drawn together would be padded to the longest
        asked = _usual_length_first(Recorder(module, code, where), plan, asked)
        code = replace(code, requests=asked)
        runs = [Recorder(module, _of_more_steps(code), where).run([0], images=1), *runs[1:]]
    denoiser = _denoiser(Recorder(module, code, where), plan, runs, schedule, together)
    return replace(
        denoiser,
        sampler_info=SamplerInfo(type(chosen).__name__, steps, _guidance(code)),
        scheduler_config=scheduler_config(chosen),
        component=name,
        config={**{k: v for k, v in config.items() if k != "_name_or_path"}, "_class_name": type(module).__name__},
        pipeline=folder.pipeline,
        requests=asked,
    )


def _scheduler(pipeline: Any, choice: str | None, steps: int, where: str) -> Any:
    """Put the scheduler that was asked for into the pipeline."""
    own = getattr(pipeline, "scheduler", None)
    if own is None:
        raise LoadError(f"{where}: {type(pipeline).__name__} has no scheduler of that name; use --factory")
    config = scheduler_config(own)
    needs_many = type(own).__name__ == MANY_STEPS and own.config.variance_type not in LEARNED
    if choice is None and not (needs_many and steps < int(own.config.num_train_timesteps)):
        return own
    pipeline.scheduler = choose_scheduler(config, choice, where)
    return pipeline.scheduler


def _usual_requests(code: PipelineCode, config: Mapping[str, Any]) -> tuple[Request, ...]:
    if code.takes("prompt"):
        return own_prompts()
    if code.takes("class_labels"):
        classes = config.get("num_embeds_ada_norm") or config.get("num_class_embeds") or 0
        return tuple({"class_labels": label} for label in range(int(classes)))
    return ()


def _of_more_steps(code: PipelineCode) -> PipelineCode:
    """A run of a step or two shows no changes."""
    steps = code.common.get("num_inference_steps")
    if not isinstance(steps, int) or steps >= TELLING:
        return code
    return replace(code, common={**code.common, "num_inference_steps": TELLING})


def _first_run(recorder: Recorder) -> RecordedRun:
    try:
        return recorder.run([0], images=1)
    except LoadError as error:
        advice = pictures_not_given(recorder.draw) if isinstance(recorder.draw, PipelineCode) else ""
        if not advice:
            raise
        raise LoadError(f"{error}; {advice}") from error


def _recorded(recorder: Recorder) -> tuple[list[RecordedRun], CallPlan, int]:
    """A run of one image and one of two, which show what belongs to an image; or two runs of one.

    Some pipelines draw one image at a time, or call their model in another form for two.
    """
    signature, first = signature_of(recorder.module), _first_run(recorder)
    try:
        runs = [first, recorder.run([1, 2], images=2)]
        return runs, plan_of(signature, runs, recorder.where), TOGETHER
    except LoadError:
        runs = [first, recorder.run([1], images=1)]
        return runs, plan_of(signature, runs, recorder.where), 1


def _guided(requests: Sequence[Request], scale: float | None) -> tuple[Request, ...]:
    """The guidance that was asked for, in every request, so that they say all there is to say."""
    if scale is None:
        return tuple(requests)
    return tuple({**request, "guidance_scale": scale} for request in requests or ({},))


def _guidance(code: PipelineCode) -> float:
    given = next((request["guidance_scale"] for request in code.requests if "guidance_scale" in request), None)
    if given is None and code.takes("guidance_scale"):
        given = parameters_of(code.pipeline)["guidance_scale"].default
    return float(given) if isinstance(given, int | float) else 1.0


def _denoiser(
    recorder: Recorder, plan: CallPlan, runs: Sequence[RecordedRun], schedule: RecordedRun, together: int
) -> Denoiser:
    plan, module = _with_independent_rows(recorder, plan, runs)
    inputs, conditioning = _examples(plan, runs)
    if plan.inputs[plan.sample].ragged:
        raise LoadError(f"{recorder.where}: {plan.sample} is of several sizes; a graph is for one size of image")
    ragged = {name: leaf.ragged for name, leaf in plan.inputs.items() if leaf.ragged}
    shapes = {name: row_shape(value, ragged.get(name, ())) for name, value in inputs.items()}
    return Denoiser(
        module=module,
        example_inputs=inputs,
        sample=plan.sample,
        timestep=plan.timestep,
        timesteps=TimestepSet.visited(_visited(plan, schedule)),
        sampler=RecordedSampler(recorder.module, plan, runs[0].answer, recorder.draw, together, shapes, recorder.where),
        sampler_info=SamplerInfo("function", len(schedule.calls)),
        conditioning=conditioning,
        unconditional={},
        component="denoiser",
        config={},
        scheduler_config=None,
        source=recorder.where,
        call=call_info(plan, runs, together),
        ragged=ragged,
    )


def _visited(plan: CallPlan, run: RecordedRun) -> NDArray[Any]:
    """The timestep of each call, [calls]."""
    place = plan.inputs[plan.timestep].path
    return np.concatenate([np.asarray(torch.as_tensor(call[place])).reshape(-1)[:1] for call in run.calls])


def _require_one_schedule(
    recorder: Recorder, plan: CallPlan, schedule: RecordedRun, requests: Sequence[Request]
) -> None:
    """Refuse requests that walk other timesteps than the first, as other strengths do."""
    wanted = _visited(plan, schedule)
    seen = [without_lists(request) for request in requests[:1]]
    for number, request in enumerate(requests):
        settings = without_lists(request)
        if settings in seen:
            continue
        seen.append(settings)
        if not np.array_equal(_visited(plan, recorder.run([number], images=1)), wanted):
            raise ConfigError(
                f"{recorder.where}: request {number + 1} of the prompts walks other timesteps than the first; a bundle "
                "is for one schedule, so give them the same settings (strength, timesteps, sigmas)"
            )


def _usual_length_first(recorder: Recorder, plan: CallPlan, requests: Sequence[Request]) -> tuple[Request, ...]:
    """Requests whose prompts are of the most common length, then the others: calibration takes those of one length."""
    if not requests:
        return ()
    lengths = [
        tuple(tuple(plan.flat_values(first)[name].shape[1:]) for name, leaf in plan.inputs.items() if leaf.ragged)
        for first in (recorder.first_call([number], plan) for number in range(len(requests)))
    ]
    often = Counter(lengths)
    return tuple(requests[place] for place in sorted(range(len(requests)), key=lambda at: -often[lengths[at]]))


def _examples(plan: CallPlan, runs: Sequence[RecordedRun]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A batch of two rows at different timesteps, and conditioning as it was recorded, [examples, ...] by name."""
    calls = [plan.flat_values(run.calls[place]) for run in runs for place in (0, -1)]
    firsts = [each for each in calls if _shapes(each) == _shapes(calls[0])]  # where prompts may be of any length
    together = {
        name: torch.cat([each[name] for each in firsts]) if value.ndim else value for name, value in firsts[0].items()
    }
    last = len(together[plan.sample]) - 1
    inputs = {name: value[[0, last]].clone() if value.ndim else value for name, value in together.items()}
    conditioning = {
        name: value[:EXAMPLES] for name, value in together.items() if name not in (plan.sample, plan.timestep)
    }
    return inputs, conditioning


def _with_independent_rows(
    recorder: Recorder, plan: CallPlan, runs: Sequence[RecordedRun]
) -> tuple[CallPlan, FlatModule]:
    """The model as a flat function whose rows do not depend on each other, and the plan that it follows.

    A model called with one number for the whole batch, which would take a timestep for each row as well, is given
    these: then rows of different timesteps run together, calibration needs fewer calls, and servers batch freely.

    Raises:
        LoadError: it cannot run on two rows together, or predicts something else for them, or nothing finite.
    """
    leaf = plan.inputs[plan.timestep]
    if not leaf.fold:
        wider = replace(plan, leaves=tuple(replace(x, fold=1) if x is leaf else x for x in plan.leaves))
        module = flat_module(recorder.module, wider).eval().requires_grad_(False)
        with contextlib.suppress(Exception):  # whatever a model raises that takes one number only
            if _rows_are_independent(module, _examples(wider, runs)[0]):
                return wider, module
    module = flat_module(recorder.module, plan).eval().requires_grad_(False)
    try:
        independent = _rows_are_independent(module, _examples(plan, runs)[0])
    except LoadError as error:
        raise LoadError(f"{recorder.where}: {error}") from error
    except Exception as error:  # the model's own code, on a batch that it was not called with
        raise LoadError(
            f"{recorder.where}: the model cannot run on two rows together: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not independent:
        raise LoadError(
            f"{recorder.where}: the model predicts something else for a row of {plan.sample} alone than in a batch of "
            "two; a graph needs rows that do not depend on each other"
        )
    return plan, module


@torch.no_grad()
def _rows_are_independent(module: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Whether two rows together give what each gives alone: else the roles of the arguments were not understood."""
    both = first_tensor(module(**inputs))
    if not both.isfinite().all():
        raise LoadError("it predicts NaN or infinity; check the checkpoint")
    rows = [
        first_tensor(module(**{name: value[row : row + 1] if value.ndim else value for name, value in inputs.items()}))
        for row in range(2)
    ]
    return is_close(both, torch.cat(rows))


def _shapes(inputs: Mapping[str, Tensor]) -> list[torch.Size]:
    return [value.shape[1:] for value in inputs.values()]


def _require_seeded(plan: CallPlan, runs: Sequence[RecordedRun], where: str) -> None:
    starts = [plan.flat_values(run.calls[0])[plan.sample] for run in runs]
    if not torch.equal(starts[0], starts[1]):
        raise ConfigError(f"{where}: draw(0) starts from other noise each time; seed its generator by it")
    calls = [[plan.flat_values(call)[plan.sample] for call in run.calls] for run in runs[:2]]
    if len(calls[0]) != len(calls[1]) or not all(torch.equal(*pair) for pair in zip(*calls, strict=True)):
        raise ConfigError(f"{where}: draw(0) draws other noise on its way each time; seed its generator by it")
    if torch.equal(starts[1], starts[2]):
        raise ConfigError(
            f"{where}: draw(0) and draw(1) start from the same noise; seed its generator with the argument"
        )
    if not np.array_equal(_visited(plan, runs[1]), _visited(plan, runs[2])):
        raise ConfigError(f"{where}: draw(1) walks other timesteps than draw(0); a bundle is for one schedule")
