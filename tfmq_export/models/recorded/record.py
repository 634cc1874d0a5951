"""Recording a model in the code that draws with it, and drawing with something else in its place."""

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from tfmq_export.bundle.call import CallInfo, LeafInfo, LeafPath, fingerprint_of
from tfmq_export.capture.denoiser import Denoise, first_tensor
from tfmq_export.capture.place import theirs
from tfmq_export.errors import LoadError, TfmqError
from tfmq_export.models.recorded.calls import (
    CallPlan,
    answering,
    each_row,
    flattened,
    forward_of,
    half_of,
    is_list,
    leaves_of,
    listed_answer,
    same,
    signature_of,
)
from tfmq_export.models.recorded.lengths import Cut, NumbersRead, cut_of, cut_prompts, cut_rows
from tfmq_export.models.recorded.roles import RecordedRun
from tfmq_export.models.unwrapped import not_compiled

GREY = ("1", "L", "LA", "I", "I;16", "F")
"""Modes of a picture without colours, as PIL calls them."""
CLOSE = 1e-3
"""Of a prediction: what another batch size, or computing without padding, may change by rounding."""
DrawSeeds = Callable[[Sequence[int], bool], Tensor]
"""``draw(seeds, pictures) -> images``: with the model inside, one image for each seed, [N, ...]."""


@dataclass(frozen=True, slots=True, eq=False)
class Recorder:
    """A model, and code that draws with it.

    Attributes:
        module: The model inside.
        draw: The code.
        where: Name of the model in messages.
    """

    module: nn.Module
    draw: DrawSeeds
    where: str

    def run(self, seeds: Sequence[int], *, images: int = 0) -> RecordedRun:
        """Record one run. Only its first call is computed; later ones get noise of the same size for an answer.

        That is enough to see how the model is called and which timesteps are visited, at the cost of one call.

        Args:
            images: How many images the run draws together; 0 if it draws one by one.
        Raises:
            LoadError: the model is never called, or the code raises.
        """
        signature, answers = signature_of(self.module), Answers(forward_of(self.module))
        calls: list[Mapping[LeafPath, Any]] = []
        specs: list[Any] = []
        lists: frozenset[str] = frozenset()
        cut: Cut | None = None

        def reply(*args: Any, **named: Any) -> Any:
            nonlocal lists, cut
            arguments, spec = flattened(signature, args, named)
            before = calls[-1] if calls else {}
            kept = {path: _kept(value, before.get(path)) for path, value in arguments.items()}
            given = inspect.BoundArguments(signature, tree_unflatten(list(arguments.values()), spec))
            with NumbersRead() as read:
                answer = answers(given, half_of(tree_leaves((args, named))))
            if not calls:
                lists = lists_of_rows(kept, answer)
                cut = self._cut(kept, spec, read.numbers, answer)
            if lists:
                arguments, spec = leaves_of(tree_unflatten(list(kept.values()), spec), lists)
            rows = each_row(arguments, lists) if lists else cut_prompts(kept, cut) if cut else [kept]
            calls.extend(rows)
            specs.extend([spec] * len(rows))
            return answer

        with answering(self.module, reply):
            try:
                drawn_by(self.draw, seeds, False, self.where)
            except LoadError as error:
                raise _about_further_tensors(error, answers.first, self.where) from error.__cause__
        self._require_called(calls)
        _require_one_form(calls, specs, self.where)
        together = 0 if (lists or cut) and images > 1 else images  # rows are calls of their own
        return RecordedRun(together, tuple(calls), specs[0], answers.first, lists, cut)

    @torch.no_grad()
    def _cut(self, call: Mapping[LeafPath, Any], spec: Any, numbers: Sequence[float], answer: Any) -> Cut | None:
        """How prompts are cut, if that changes nothing."""
        cut = cut_of(call, numbers) if numbers else None
        if cut is None:
            return None
        found = []
        for part in cut_rows(call, cut):
            mask = torch.ones(part[cut.tokens].shape[:2], dtype=part[cut.mask])
            given = tree_unflatten([mask if path == cut.mask else value for path, value in part.items()], spec)
            bound = inspect.BoundArguments(signature_of(self.module), given)
            found.append(first_tensor(forward_of(self.module)(*bound.args, **bound.kwargs)))
        return cut if is_close(torch.cat(found), first_tensor(answer)) else None

    def first_call(self, seeds: Sequence[int], plan: CallPlan) -> Mapping[LeafPath, Any]:
        """The arguments of the first call of a run, which ends there: what prompts cost, and no more.

        Args:
            plan: How the model is called; the first rows of one shape are what is given.
        Raises:
            LoadError: the model is never called, or the code raises.
        """
        signature = signature_of(self.module)
        found: dict[LeafPath, Any] = {}

        def reply(*args: Any, **named: Any) -> Any:
            found.update(plan.batches(flattened(signature, args, named, plan.lists)[0])[0])
            raise _Enough

        with answering(self.module, reply), contextlib.suppress(_Enough):
            drawn_by(self.draw, seeds, False, self.where)
        self._require_called(found)
        return found

    def _require_called(self, seen: Sized) -> None:
        if not seen:
            raise LoadError(
                f"{self.where}: drew an image without calling the model; return the module that draw() uses"
            )


def is_close(found: Tensor, wanted: Tensor) -> bool:
    """Whether two predictions are the same but for rounding."""
    limit = CLOSE * float(wanted.abs().max())
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=CLOSE, atol=limit)


class _Enough(BaseException):
    """Ends a run at the model's first call; no code that catches exceptions takes it for one of its own."""


def lists_of_rows(call: Mapping[LeafPath, Any], answer: Any) -> frozenset[str]:
    """Arguments that are lists with a tensor for each row.

    A model that returns its prediction as a list takes lists as long: a tensor for each image or half of guidance.

    Args:
        call: As recorded.
        answer: What the model returned.
    """
    returned = listed_answer(answer)
    if returned is None:
        return frozenset()
    lengths = Counter(path[0] for path in call if len(path) == 2 and isinstance(path[1], int))
    others = {path[0] for path, value in call.items() if len(path) != 2 or not isinstance(value, Tensor)}
    return frozenset(str(name) for name, count in lengths.items() if count == len(returned) and name not in others)


class Answers:
    """The first answer is the model's own, the others are noise of its size and form; in half precision if asked."""

    def __init__(self, compute: Callable[..., Any]) -> None:
        self._compute = compute
        self._noise = torch.Generator().manual_seed(0)
        self.first: Any = None

    @torch.no_grad()
    def __call__(self, given: inspect.BoundArguments, half: torch.dtype | None) -> Any:
        if self.first is None:
            found = self._compute(*given.args, **given.kwargs)
            first_tensor(found)  # refuses where there is none
            self.first = found if half is None else tree_map_only(Tensor, partial(_as_float, half), found)
            return self.first
        rows = listed_answer(self.first)
        like = first_tensor(self.first) if rows is None else torch.stack(rows)
        noise = torch.randn(like.shape, generator=self._noise)
        return answer_with(self.first, (noise * like.float().std(correction=0).cpu()).to(like.device))


def _as_float(dtype: torch.dtype, value: Tensor) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def answer_with(form: Any, prediction: Tensor) -> Any:
    """An answer of the model's own form with another prediction; further tensors it had are None.

    Args:
        form: What the model returns.
        prediction: [N, ...]; where the form is a list with a tensor for each row, of any number of rows.
    """
    leaves, spec = tree_flatten(form, is_leaf=is_list)
    place = next(number for number, leaf in enumerate(leaves) if is_list(leaf) or isinstance(leaf, Tensor))
    kept = [None if is_list(leaf) or isinstance(leaf, Tensor) else leaf for leaf in leaves]
    found = leaves[place]
    kept[place] = list(prediction.to(found[0].dtype).unbind(0)) if is_list(found) else prediction.to(found.dtype)
    return tree_unflatten(kept, spec)


@dataclass(frozen=True, slots=True, eq=False)
class RecordedSampler:
    """Draws images through the code that the model came with.

    Attributes:
        module: The model inside, in whose place something else answers.
        plan: How it is called.
        answer: What it returned once.
        code: Draws.
        together: How many images one run draws at most.
        shapes: Of each input of the plan, without its rows; None for a size that may vary.
        where: Name of the model in messages.
    """

    module: nn.Module
    plan: CallPlan
    answer: Any
    code: DrawSeeds
    together: int
    shapes: Mapping[str, tuple[int | None, ...]]
    where: str

    def draw(self, denoise: Denoise, seeds: Sequence[int], *, pictures: bool = False) -> Tensor:
        """Draw an image for each seed with ``denoise`` in the model's place, [N, ...].

        Raises:
            LoadError: the code raises, or returns no images.
        """

        def reply(*args: Any, **named: Any) -> Any:
            predictions = []
            for flat in self.plan.flat(args, named):
                self._require_shapes(flat)
                sample, timestep = flat.pop(self.plan.sample), flat.pop(self.plan.timestep)
                predictions.append(denoise(sample, timestep, **flat))
            return answer_with(self.answer, torch.cat(predictions) if len(predictions) > 1 else predictions[0])

        with answering(self.module, reply):
            return drawn_by(self.code, seeds, pictures, self.where)

    def _require_shapes(self, flat: Mapping[str, Tensor]) -> None:
        for name, wanted in self.shapes.items():
            sizes = tuple(flat[name].shape[1:])
            if len(sizes) == len(wanted) and all(x in (None, y) for x, y in zip(wanted, sizes, strict=True)):
                continue
            raise LoadError(
                f"{self.where}: {name} is {list(sizes)} for one request and {list(wanted)} for the first ones; a graph "
                "is for one size and one number of frames, and where prompts may be of any length, let the first two "
                "of --prompts differ in length"
            )


def drawn_by(code: DrawSeeds, seeds: Sequence[int], pictures: bool, where: str) -> Tensor:
    """Images of code that is not ours, [N, ...].

    Raises:
        LoadError: what it raised, named as its own; or it returned no images.
    """
    with torch.random.fork_rng(devices=[]), not_compiled():
        torch.manual_seed(seeds[0])
        try:
            images = code(seeds, pictures)
        except TfmqError:
            raise
        except Exception as error:  # the user's or a pipeline's own code, which may raise anything
            raise LoadError(f"{where}: drawing raises {theirs(error)}") from error
    return images


def _about_further_tensors(error: LoadError, answer: Any, where: str) -> LoadError:
    """What stopped code that draws, told as what it most likely is: it reads more than the model's prediction.

    Args:
        answer: What the model returned at its first call; None if that did not come.
    """
    shapes = [list(leaf.shape) for leaf in tree_leaves(answer) if isinstance(leaf, Tensor)]
    if error.__cause__ is None or len(shapes) < 2 or listed_answer(answer) is not None:
        return error
    return LoadError(
        f"{where}: the model returns {len(shapes)} tensors, of shapes {', '.join(map(str, shapes))}, and its code "
        f"needs more than the first (without it raises {theirs(error.__cause__)}); a bundle predicts one tensor"
    )


def call_info(plan: CallPlan, runs: Sequence[RecordedRun], together: int) -> CallInfo:
    """The plan as a manifest tells it.

    Args:
        together: How many images may be drawn in one run.
    """
    leaves = tuple(
        LeafInfo(leaf.path, counts=leaf.counts)
        if leaf.counts
        else LeafInfo(leaf.path, constant=_fingerprint(leaf.value))
        if leaf.name is None
        else LeafInfo(leaf.path, leaf.name, leaf.fold, leaf.axis, listed=leaf.listed)
        for leaf in plan.leaves
    )
    sample, timestep = plan.inputs[plan.sample].path, plan.inputs[plan.timestep].path
    first = runs[0]
    rows = len(first.calls[0][sample]) // first.images if first.images else 0
    visited = [float(torch.as_tensor(call[timestep]).reshape(-1)[0]) for call in first.calls]
    alike = next((place for place, value in enumerate(visited) if value != visited[0]), len(visited))
    return CallInfo(leaves, rows, alike, together)


def _fingerprint(value: Any) -> str:
    if not isinstance(value, Tensor):
        return fingerprint_of(value)
    return fingerprint_of((value.float() if value.is_floating_point() else value).numpy(force=True))


def image_of(drawn: Any, where: str) -> Tensor:
    """What a user's ``draw(seed)`` returned, in floating point; a batch of one is its image.

    Args:
        drawn: A tensor, an array or a list of them: [C, H, W], [1, C, H, W], or whatever else one image is; or a
            picture of PIL.
    Raises:
        LoadError: none of these.
    """
    if isinstance(drawn, list | tuple) and len(drawn) == 1 and _is_picture(drawn[0]):
        drawn = drawn[0]
    if _is_picture(drawn):
        drawn = np.atleast_3d(np.asarray(drawn.convert("L" if drawn.mode in GREY else "RGB"), np.float32) / 255)
        drawn = drawn.transpose(2, 0, 1)
    if isinstance(drawn, list | tuple) and drawn and all(isinstance(each, Tensor | np.ndarray) for each in drawn):
        drawn = torch.stack([torch.as_tensor(each) for each in drawn])
    if not isinstance(drawn, Tensor | np.ndarray):
        kind = type(drawn).__name__
        raise LoadError(
            f"{where}: draw(seed) returned {kind}; return the image as a tensor, [C, H, W], or as a picture"
        )
    image = torch.as_tensor(drawn).detach().float().cpu()
    if image.ndim < 2:
        raise LoadError(f"{where}: draw(seed) returned shape {list(image.shape)}; return the image, [C, H, W]")
    return image[0] if image.ndim > 3 and len(image) == 1 else image


def _is_picture(value: Any) -> bool:
    return type(value).__module__.startswith("PIL.")


def _kept(value: Any, before: Any) -> Any:
    """A copy that later steps of the sampler do not write to; the last call's, where nothing changed."""
    if isinstance(value, Tensor) and isinstance(before, Tensor) and same(value, before):
        return before
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if isinstance(value, np.ndarray) else value


def _require_one_form(calls: Sequence[Mapping[LeafPath, Any]], specs: Sequence[Any], where: str) -> None:
    for call, spec in zip(calls, specs, strict=True):
        if spec != specs[0]:
            raise LoadError(
                f"{where}: the model is called in two forms, once with {len(calls[0])} arguments and once with "
                f"{len(call)}; give it the same arguments at every call"
            )
