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

from blockem_tl.decoding import last_logits
from blockem_tl.models import Model


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
    """Inside the block the last block's attention and MLP run for the last position alone, and give zeros elsewhere.

    A prefill reads nothing else there, besides keys and values, which are written for all positions. A part inside which one of
    ``sites`` lies, which hooks act on, runs as ever.
    """
    top = f"blocks.{model.cfg.n_layers - 1}"
    acted_on = [str(model.hook_dict[site].name) for site in sites]
    with ExitStack() as shortened:
        for part, short in (("attn", _last_query), ("mlp", _last_output)):
            module: Any = getattr(_blocks(model)[-1], part, None)
            if module is not None and not any(name.startswith(f"{top}.{part}.") for name in acted_on):
                shortened.enter_context(_forwards([module], short(module)))
        yield


def _last_output(mlp: Any) -> Callable[..., Any]:
    """An MLP's forward, on the last position."""
    plain = mlp.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = plain(hidden[:, -1:], *args, **kwargs)
        if not isinstance(out, Tensor):  # experts give their router's choices too
            return plain(hidden, *args, **kwargs)
        return _padded(out, hidden)

    return forward


_SLICED: dict[str, Callable[[Any], Any]] = {
    "attention_mask": lambda mask: mask[..., -1:, :] if mask is not None and mask.ndim == 4 else mask,
    "position_ids": lambda ids: None if ids is None else ids[..., -1:],
    "position_embeddings": lambda pair: None if pair is None else tuple(part[..., -1:, :] for part in pair),
}
"""What attention is told of positions, for the last of them."""


def _last_query(attention: Any) -> Callable[..., Any]:
    """Attention's forward for the last position's query: keys and values of all positions first, then that position by itself.

    As it was where no cache takes the keys and values, or where attention is told something that might have to be cut as well.
    """
    plain, queries = attention.forward, getattr(attention, "q", None)
    unread = [] if queries is None else [(queries, _repeating(queries.forward))]  # while keys and values are made

    def forward(*args: Any, **kwargs: Any) -> Any:
        if "hidden_states" not in kwargs and args:
            kwargs, args = {"hidden_states": args[0], **kwargs}, args[1:]
        hidden = kwargs.pop("hidden_states")
        caches = [name for name, value in kwargs.items() if isinstance(value, Cache)]
        unknown = args or any(isinstance(value, (Tensor, tuple)) for name, value in kwargs.items() if name not in _SLICED)
        if len(caches) != 1 or unknown:
            return plain(hidden, *args, **kwargs)
        keeping = _Keeping(kwargs[caches[0]])
        with ExitStack() as briefly, suppress(_Reached):
            for module, instead in unread:
                briefly.enter_context(_forwards([module], instead))
            plain(hidden, **{**kwargs, caches[0]: keeping})
        if keeping.kept is None:  # it wrote nothing
            return plain(hidden, **kwargs)
        last = {name: _SLICED[name](value) if name in _SLICED else value for name, value in kwargs.items()}
        found = plain(hidden[:, -1:], **{**last, caches[0]: keeping})
        return (_padded(found[0], hidden), *found[1:]) if isinstance(found, tuple) else _padded(found, hidden)

    return forward


def _repeating(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The last position's output at all positions."""
    return lambda hidden, *args, **kwargs: plain(hidden[:, -1:], *args, **kwargs).expand(-1, hidden.shape[1], -1)


class _Keeping:
    """In place of a cache: ends attention's forward once its keys and values are written, and then gives these back."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.kept = cache, None

    def update(self, *args: Any, **kwargs: Any) -> Any:
        if self.kept is not None:
            return self.kept
        self.kept = self.cache.update(*args, **kwargs)
        raise _Reached

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def _padded(last: Float[Tensor, "batch 1 d_model"], whole: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
    return pad(last, (0, 0, whole.shape[1] - 1, 0))


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
