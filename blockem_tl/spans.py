"""Running part of a model: the forward begins at a block with a given residual stream, or ends below one.

The bridge has `stop_at_layer` and no start. Here the model's own forward runs, so that masks, position embeddings and hooks are its own,
and the blocks that are left out hand on what they are told to.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

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
    """Inside the block the last block's MLP runs on the last position alone, and gives zeros elsewhere: a prefill reads nothing else there.

    Not where one of ``sites``, which hooks act on, lies inside that MLP.
    """
    mlp: Any = getattr(_blocks(model)[-1], "mlp", None)
    within = f"blocks.{model.cfg.n_layers - 1}.mlp."
    if mlp is None or any(str(model.hook_dict[site].name).startswith(within) for site in sites):
        yield
        return
    plain = mlp.forward

    def last_only(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = plain(hidden[:, -1:], *args, **kwargs)
        if not isinstance(out, Tensor):  # experts give their router's choices too
            return plain(hidden, *args, **kwargs)
        return pad(out, (0, 0, hidden.shape[1] - 1, 0))

    with _forwards([mlp], last_only):
        yield


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
