"""Running part of a model: the forward begins at a block with a given residual stream, or ends below one.

The bridge has `stop_at_layer` and no start. Here the model's own forward runs, so that masks, position embeddings and hooks are its own,
and the blocks that are left out hand on what they are told to.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from blockem_tl.generation._decoder import last_logits
from blockem_tl.models.load import Model


class _Reached(Exception):  # noqa: N818 - no error: the forward has come as far as it should
    pass


@contextmanager
def entering(model: Model, first: int, state: Float[Tensor, "batch pos d_model"]) -> Iterator[None]:
    """Inside the block forwards begin at block ``first`` (n_layers: at the final norm) with ``state`` as the residual stream.

    The blocks below do not run: none of their hooks fires, and they write no keys and values.
    """
    with _forwards(_blocks(model)[:first], lambda *args, **kwargs: state):
        yield


def run_below(model: Model, stop: int, **inputs: Any) -> None:
    """Run the embedding and the blocks below ``stop``; what is wanted of them is what hooks and a cache keep."""
    if stop >= model.cfg.n_layers:
        last_logits(model)(**inputs)
        return

    def halt(*args: Any, **kwargs: Any) -> None:
        raise _Reached

    with _forwards(_blocks(model)[stop : stop + 1], halt), suppress(_Reached):
        last_logits(model)(**inputs)


@contextmanager
def short_top(model: Model, sites: Iterable[str] = ()) -> Iterator[None]:
    """Inside the block the last block runs for the last position alone (hooks at its output see only that), and gives zeros elsewhere.

    A prefill reads nothing else there, besides keys and values, which are written for all positions. It runs whole where one of ``sites``,
    which hooks act on, lies inside it, where no cache takes its keys and values, or where it is told something that might need cutting.
    """
    top, inside = _blocks(model)[-1], f"blocks.{model.cfg.n_layers - 1}."
    acted_on = {str(model.hook_dict[site].name) for site in sites} - {f"{inside}hook_out"}
    if any(name.startswith(inside) for name in acted_on):
        yield
        return
    with _forwards([top], _last_position(top)):
        yield


def _last_position(block: Any) -> Callable[..., Any]:
    """A block's forward for the last position: keys and values of all positions first, then that position by itself."""
    plain, queries = block.forward, getattr(getattr(block, "attn", None), "q", None)
    unread = [] if queries is None else [(queries, _repeating(queries.forward))]  # while keys and values are made

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = [*enumerate(args), *kwargs.items()]
        caches = [value for _, value in given if isinstance(value, Cache)]
        if len(caches) != 1 or not all(value is caches[0] or _can_cut(name, value) for name, value in given):
            return plain(*args, **kwargs)
        keeping = _Keeping(caches[0])

        def told(change: Callable[[int | str, Any], Any]) -> tuple[list[Any], dict[str, Any]]:
            put = [keeping if value is caches[0] else change(name, value) for name, value in given]
            return put[: len(args)], dict(zip(kwargs, put[len(args) :], strict=True))

        whole_args, whole_kwargs = told(lambda _, value: value)
        with ExitStack() as briefly, suppress(_Reached):
            for module, instead in unread:
                briefly.enter_context(_forwards([module], instead))
            plain(*whole_args, **whole_kwargs)
        if keeping.kept is None:  # it wrote nothing
            return plain(*args, **kwargs)
        last_args, last_kwargs = told(_cut)
        found, before = plain(*last_args, **last_kwargs), (args[0] if args else kwargs["hidden_states"]).shape[1] - 1
        first, *rest = found if isinstance(found, tuple) else (found,)
        padded = pad(first, (0, 0, before, 0))  # some models insist on the width they began with
        return (padded, *rest) if isinstance(found, tuple) else padded

    return forward


_ALONG = {0: -2, "hidden_states": -2, "position_ids": -1, "position_embeddings": -2}
"""Which axis of what a block is told runs along positions; 0 is its first argument, the residual stream."""


def _can_cut(name: int | str, value: Any) -> bool:
    """Whether the value is known to be right for the last position, as it is or cut."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return True
    if isinstance(value, tuple):
        return name in _ALONG
    return isinstance(value, Tensor) and (name in _ALONG or name == "attention_mask" or value.ndim == 4)


def _cut(name: int | str, value: Any) -> Any:
    """What is told of the last position."""
    if isinstance(value, tuple):
        return tuple(_cut(name, part) for part in value)
    if not isinstance(value, Tensor) or not (name in _ALONG or value.ndim == 4):
        return value  # no tensor, or a mask over keys alone
    axis = _ALONG.get(name, -2)  # a mask's [batch 1 query key]
    return value.narrow(axis, value.shape[axis] - 1, 1)


def _repeating(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The last position's output at all positions."""
    return lambda hidden, *args, **kwargs: plain(hidden[:, -1:], *args, **kwargs).expand(-1, hidden.shape[1], -1)


class _Keeping:
    """In place of a cache: ends the forward once keys and values are written, and then gives these back."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.kept = cache, None

    def update(self, *args: Any, **kwargs: Any) -> Any:
        if self.kept is not None:
            return self.kept
        self.kept = self.cache.update(*args, **kwargs)
        raise _Reached

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def _blocks(model: Model) -> list[nn.Module]:
    return list(model.blocks)


@contextmanager
def _forwards(modules: Iterable[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the block the modules compute ``forward``."""
    before = [(module, module.__dict__.get("forward")) for module in modules]
    try:
        for module, _ in before:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before:
            del module.__dict__["forward"]
            if own is not None:
                module.__dict__["forward"] = own
