"""The five interventions of the field as hooks over named activations, and the strict way to attach them.

A hook is TransformerLens's own pair ``(hook_name, fn(activation, hook))``. A site is a full hook name, such as
``blocks.2.hook_resid_post``, the residual stream h after block 2, [batch pos d_model]. Each factory returns such a pair::

    record(site, store)                 store[site] = h                           look, change nothing
    steer(site, d, dose, scale=s)       h <- h + dose * s * d                     push along a direction (paper, eq. 6)
    clamp(site, d, low, high)           h <- h + (clip(<h, d>) - <h, d>) d        hold a coordinate inside bounds
    ablate(site, D)                     h <- h - Q Q^T h, Q spans D               take directions out
    patch(site, source, where)          h <- source, at the positions ``where``   put another run's states in

Factories know nothing of the model class, so they run on `Model`, on a bridge and on a `HookedTransformer` alike::

    model.run_with_hooks(tokens, fwd_hooks=[steer("blocks.2.hook_resid_post", direction, dose=0.7, scale=scale)])
    with attached(model, [record("blocks.2.hook_resid_post", store)]):
        model(tokens)

A hook returns a new tensor and never mutates its input, or returns None. Its ``hook.name`` is the model's spelling of the site.
`attached`, `Model.hooks` and `Model.run_with_hooks` are strict: an unknown site raises with the close matches, and a hook that never
fired raises `HookNotFired`. TransformerLens itself ignores both in silence.
"""

import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from blockem_tl.types import check_hooks

HookFunction = Callable[..., Tensor | None]
Hook = tuple[str, HookFunction]
NameOrFilter = str | Callable[[str], bool]
_Pairs = Iterable[tuple[NameOrFilter, HookFunction]]


class HookNotFired(RuntimeError):  # noqa: N818 - the name says it
    """An intervention that did not happen: a hook was attached, and no forward reached its site."""


@runtime_checkable
class HasHookPoints(Protocol):
    """Anything with TransformerLens hook points by name: a bridge, a `HookedTransformer`, our `Model`."""

    @property
    def hook_dict(self) -> Mapping[str, HookPoint]:
        """Every hook point by name."""
        ...


# ------------------------------------------------------------------------------------------------ the five interventions


def record(site: str, store: dict[str, Tensor], *, detach: bool = True) -> Hook:
    """store[site] = h: keep the activation, leave the forward as it is.

    The shape is the site's own, [batch pos d_model] for the residual stream. ``detach=False`` keeps the graph (for penalties).
    Under a KV cache each step overwrites the last; record into a list of your own if you want every step.
    """

    def fn(activation: Tensor, hook: HookPoint) -> None:
        store[site] = activation.detach() if detach else activation

    return site, fn


def steer(
    site: str,
    direction: Float[Tensor, "*batch d_model"],
    dose: float | Float[Tensor, " batch"] = 1.0,
    *,
    scale: float = 1.0,
) -> Hook:
    """h <- h + dose * scale * direction at every position, prompt and generated (eq. 6 of the paper with a unit direction).

    Args:
        site: hook name.
        direction: one [d_model] for all rows, or [batch d_model], one per row. It is not normalised here.
        dose: dimensionless strength; one number, or one per row [batch].
        scale: the site's median residual norm s, so that doses mean the same at every site (see `models.activations`).

    Raises:
        ValueError: a direction of another rank or with NaN or infinite entries, or such a dose.
        ValueError: at run time, a width or a number of rows that does not fit the activation.
    """
    doses = torch.as_tensor(dose, dtype=torch.float32)
    if direction.ndim not in (1, 2) or doses.ndim > 1:
        raise ValueError(
            f"steer at {site}: expected a direction [d_model] or [batch, d_model] and a dose scalar or [batch], "
            f"got {tuple(direction.shape)} and {tuple(doses.shape)}"
        )
    vectors = (doses[..., None] * scale).to(direction.device) * direction  # [d_model] or [batch d_model]
    if not torch.isfinite(vectors).all():
        raise ValueError(f"steer at {site}: expected finite directions and doses, and products, got NaN or infinity: where are they from?")

    def fn(activation: Tensor, hook: HookPoint) -> Tensor:
        _check_width(site, vectors, activation)
        if vectors.ndim == 2 and len(vectors) != len(activation):  # torch would broadcast a batch of one in silence
            raise ValueError(f"steer at {site}: expected one direction per row of the batch ({len(activation)}), got {len(vectors)}")
        added = vectors.to(activation)
        return activation + (added if added.ndim == 1 else added[:, None, :])

    return site, fn


def clamp(site: str, direction: Float[Tensor, " d_model"], low: float | None = None, high: float | None = None) -> Hook:
    """h <- h + (clip(<h, d>, low, high) - <h, d>) d: move h along d just so far that its coordinate lies in [low, high].

    d is the unit direction; everything orthogonal to it is untouched. Raises ValueError for no bounds, low > high, or a zero direction.
    """
    if low is high is None or not (float("-inf") if low is None else low) <= (float("inf") if high is None else high):
        raise ValueError(f"clamp at {site}: expected low <= high with at least one of them, got low={low}, high={high}")
    if not torch.isfinite(direction).all() or direction.norm() == 0:
        raise ValueError(f"clamp at {site}: expected a finite, non-zero direction")
    unit = direction.float() / direction.float().norm()

    def fn(activation: Tensor, hook: HookPoint) -> Tensor:
        _check_width(site, unit, activation)
        d, h = unit.to(activation.device), activation.float()
        coordinate = h @ d
        return (h + (coordinate.clamp(min=low, max=high) - coordinate)[..., None] * d).to(activation.dtype)

    return site, fn


def ablate(site: str, directions: Float[Tensor, "*n_directions d_model"]) -> Hook:
    """h <- h - Q Q^T h, with Q an orthonormal basis of the span of ``directions``: project them out.

    Args:
        directions: [d_model] or [n_directions d_model]; they need not be unit or orthogonal.

    Raises:
        ValueError: directions that are zero or not finite, or (at run time) of the wrong width.
    """
    rows = torch.atleast_2d(directions).float()
    if not torch.isfinite(rows).all() or (rows.norm(dim=-1) == 0).any():
        raise ValueError(f"ablate at {site}: expected finite, non-zero directions, got zero, NaN or infinite rows")
    basis = orthonormal_basis(rows)

    def fn(activation: Tensor, hook: HookPoint) -> Tensor:
        _check_width(site, basis.T, activation)
        q, h = basis.to(activation.device), activation.float()  # in bf16 the projection would leave ten times more behind
        return (h - (h @ q) @ q.T).to(activation.dtype)

    return site, fn


def patch(site: str, source: Float[Tensor, "batch pos *rest"], where: Bool[Tensor, "batch pos"] | None = None) -> Hook:
    """h <- source, at the positions at which ``where`` is True (all of them by default).

    Raises:
        ValueError: at run time, where the shapes differ (a cached single-token step has another number of positions).
    """

    def fn(activation: Tensor, hook: HookPoint) -> Tensor:
        if activation.shape != source.shape:
            raise ValueError(
                f"patch at {site}: expected a source of the activation's shape {tuple(activation.shape)}, got "
                f"{tuple(source.shape)}; run source and target on the same tokens with the same padding"
            )
        replacement = source.to(activation)
        if where is None:
            return replacement
        mask = where.to(activation.device).reshape(*where.shape, *[1] * (activation.ndim - 2))
        return torch.where(mask, replacement, activation)

    return site, fn


def orthonormal_basis(rows: Float[Tensor, "n_directions d_model"]) -> Float[Tensor, "d_model rank"]:
    """Orthonormal columns that span the rows; repeated directions span fewer dimensions than there are rows."""
    left, sizes, _ = torch.linalg.svd(rows.float().T, full_matrices=False)
    return left[:, sizes > sizes.max() * 1e-6]


def _check_width(site: str, vectors: Tensor, activation: Tensor) -> None:
    if activation.shape[-1] != vectors.shape[-1]:
        raise ValueError(
            f"{site}: expected a direction of width {activation.shape[-1]} (the site's), got {vectors.shape[-1]}; "
            "was it read at another site or from another model?"
        )


# ------------------------------------------------------------------------------------------------ attaching


def resolve(points: Mapping[str, HookPoint], site: str) -> HookPoint:
    """The hook point called ``site``. Raises ValueError, with the close matches, if there is none."""
    if site in points:
        return points[site]
    close = difflib.get_close_matches(site, points, n=5, cutoff=0.5)
    hint = f"; close matches: {', '.join(close)}" if close else ""
    raise ValueError(f"unknown site {site!r}: expected one of the model's {len(points)} hook names{hint}. List them with model.hook_dict")


def matching(points: Mapping[str, HookPoint], name: NameOrFilter) -> list[HookPoint]:
    """The distinct hook points that a name or a filter on names selects. Raises ValueError if there is none."""
    if isinstance(name, str):
        return [resolve(points, name)]
    found = list({id(point): point for key, point in points.items() if name(key)}.values())
    if not found:
        raise ValueError(f"the filter {name!r} selects none of the model's {len(points)} hook names")
    return found


def attached(model: HasHookPoints, fwd_hooks: _Pairs = (), bwd_hooks: _Pairs = ()) -> AbstractContextManager[None]:
    """Attach hooks for the time of the block; afterwards they are gone, whatever happened inside.

    Raises TypeError for what is no hook, ValueError for an unknown site, both before any is attached; HookNotFired if one never fired.
    """
    return attached_to(model.hook_dict, fwd_hooks, bwd_hooks)


@contextmanager
def attached_to(points: Mapping[str, HookPoint], fwd_hooks: _Pairs, bwd_hooks: _Pairs = ()) -> Iterator[None]:
    """`attached`, with the model's hook points by name already at hand."""
    wanted: list[tuple[Literal["fwd", "bwd"], NameOrFilter, HookFunction, list[HookPoint]]] = []
    for name, fn in check_hooks(fwd_hooks):
        wanted.append(("fwd", name, fn, matching(points, name)))
    for name, fn in check_hooks(bwd_hooks):
        wanted.append(("bwd", name, fn, matching(points, name)))
    fired = [0] * len(wanted)
    level = _next_level()
    try:
        for index, (direction, _, fn, targets) in enumerate(wanted):
            for point in targets:
                point.add_hook(_counting(fn, fired, index), dir=direction, level=level)
        yield
    finally:
        for direction, _, _, targets in wanted:
            for point in targets:
                point.remove_hooks(dir=direction, level=level)
    silent = [name for (_, name, _, _), count in zip(wanted, fired, strict=True) if count == 0]
    if silent:
        raise HookNotFired(
            f"hooks never fired at {silent}: the model was not run, it stopped before the site (stop_at_layer), or the site is "
            "gated off (see model.set_use_attn_result and its like). The intervention did not happen"
        )


def _counting(fn: HookFunction, fired: list[int], index: int) -> HookFunction:
    def counted(activation: Tensor, hook: Any) -> Tensor | None:
        fired[index] += 1
        return fn(activation, hook=hook)

    return counted


_next_level = itertools.count(1_000_000).__next__  # far above TransformerLens's own levels: neither removes the other's hooks


# ------------------------------------------------------------------------------------------------ positions


@dataclass(frozen=True, kw_only=True)
class Step:
    """The batch that runs now, for hooks that must know which token they see (under padding and a KV cache).

    mask: [batch pos], True at real tokens of this step.
    positions: [batch pos], index of each token in its unpadded sequence.
    is_prompt: True during the prefill, False at generated tokens.
    rows: [batch], index into the whole stream of rows: condition index x number of prompts + prompt index.
    made: [batch], tokens of each row's reply so far: 0 when its prompt runs, t when its reply token t - 1 runs and chooses the next.
    number: counts the forwards of this stream from 0; the first prefill is 0.
    """

    mask: Bool[Tensor, "batch pos"]
    positions: Int[Tensor, "batch pos"]
    is_prompt: bool
    rows: Int[Tensor, " batch"]
    made: Int[Tensor, " batch"]
    number: int = 0


_current: ContextVar[Step | None] = ContextVar("step", default=None)  # per thread: two models may speak at once


@contextmanager
def step(now: Step) -> Iterator[None]:
    """Tell hooks what the forward inside the block runs on; `generate` does this at every step."""
    token = _current.set(now)
    try:
        yield
    finally:
        _current.reset(token)


def current_step() -> Step:
    """The running `Step`. Raises RuntimeError outside of `generate`."""
    now = _current.get()
    if now is None:
        raise RuntimeError("current_step(): expected a forward inside generate(); a plain forward has no step, use its attention mask")
    return now
