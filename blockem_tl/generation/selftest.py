"""The self-test of a loaded model: it does what this library takes for granted, or its architecture is refused by name.

`load_model(check="fast")` runs it once per architecture and library versions. `blockem doctor` shows the same checks one by one.
Fast takes three short prompts and five tokens each; full takes longer ones, all blocks, and a LoRA adapter that comes and goes.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from blockem_tl.data.public import cache_folder
from blockem_tl.generation import _checks
from blockem_tl.generation._checks import FAST, FULL
from blockem_tl.models.load import Model
from blockem_tl.storage import files, fingerprints

Level = Literal["fast", "full"]


class SelfTestFailed(ValueError):  # noqa: N818 - reads as what happened
    """A loaded model does not do what the library takes for granted, so results on it would be wrong."""


def self_test(model: Model, plain: Float[Tensor, "pos d_vocab"], level: Level) -> None:
    """Run every check, unless this architecture has passed them under these library versions.

    Args:
        plain: what `probe_logits` gave on the transformers model before it was bridged.

    Raises:
        SelfTestFailed: naming the architecture and the check.
    """
    path = cache_folder() / "self-tests" / f"{_identity(model, level)}.json"
    if path.is_file():
        return
    seen = {name: run_check(model, name, check) for name, check in checks(level, plain).items()}
    _keep(path, {"architecture": _architecture(model), "level": level, "seen": seen, "environment": files.environment()})


def checks(level: Level, plain: Float[Tensor, "pos d_vocab"] | None = None) -> dict[str, Callable[[Model], str]]:
    """The checks by name; each returns what was seen, or raises. Without ``plain`` the comparison with it is left out."""
    size = FAST if level == "fast" else FULL
    found: dict[str, Callable[[Model], str]] = {} if plain is None else {"same logits": partial(_checks.same_logits, plain=plain)}
    found |= {
        "steering": partial(_checks.steering_acts, size=size),
        "edits": partial(_checks.edits_reach_the_logits, size=size),
        "replies": partial(_checks.replies_equal_plain_ones, size=size),
        "end of turn": _checks.turns_end,
        "rendering": _checks.renders_the_same_tomorrow,
    }
    return found | ({"adapters": _checks.adapters_come_and_go} if level == "full" else {})


def run_check(model: Model, name: str, check: Callable[[Model], str]) -> str:
    """What the check saw. Raises SelfTestFailed, naming the architecture, for whatever went wrong in it."""
    try:
        with torch.no_grad():
            return check(model)
    except Exception as error:  # what a broken architecture raises inside is as bad as a wrong number
        raise SelfTestFailed(
            f"{_architecture(model)}: the self-test {name!r} failed: {error}. Results on this architecture would be wrong; load_model(..., "
            'check="off") loads it all the same'
        ) from error


def _architecture(model: Model) -> str:
    return type(model.original_model).__name__


def _identity(model: Model, level: Level) -> str:
    """The architecture with its shape, where and in what dtype it runs, its chat template, and the libraries' versions."""
    config = {k: v for k, v in cast(Any, model.original_model).config.to_dict().items() if not k.startswith("_")}
    weights = next(model.original_model.parameters())
    about = (
        _architecture(model),
        config,
        str(weights.dtype),
        weights.device.type,
        model.attention,
        model.tokenizer.chat_template,
        files.environment(),
        level,
    )
    return fingerprints.of_value(about)[:32]


def _keep(path: Path, found: dict[str, Any]) -> None:
    with suppress(OSError):  # a cache folder that cannot be written costs seconds at the next load, no more
        files.write_json(path, found)
