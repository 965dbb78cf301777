"""Averages over the same tokens in base, plain and blocked, role by role.

An average is over rows, of means over each row's tokens in the role: stage 1 and the penalty average so too, and a long reply weighs no
more than a short one.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from blockem_tl.data.chat import Batch, Encoded
from blockem_tl.models.activations import read_sites
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.views.progress import progress_bar

ARMS = ("base", "plain", "blocked")
ROLES = ("system", "prompt", "reply")
MOST_ROWS = 16
"""Rows per forward, if nobody says how many."""
Read = dict[str, Float[Tensor, "tokens _"]]
"""One arm's reading of some tokens of one row: activations by site, or numbers made of them."""
Means = list[tuple[str, dict[str, int], dict[str, dict[str, Tensor]]]]
"""Role by role: the role, how many rows and tokens it has, and arm -> name -> average, in double precision on the CPU."""


def check_arms(model: Model, plain: str | Path, blocked: str | Path) -> None:
    """Raise ValueError unless both are adapters, held or in folders, and not one and the same."""
    for arm in (plain, blocked):
        model.check_adapter(arm)
    if plain == blocked:
        raise ValueError(f"rerouting: expected two adapters, got {plain!r} as plain and as blocked")


@torch.no_grad()
def averaged(
    model: Model,
    sites: Sequence[str],
    rows: Sequence[Encoded],
    arms: tuple[str | Path, str | Path],
    read: Callable[[Read], Read],
    measure: Callable[[Read, Read, Read], Sequence[dict[str, Tensor]]],
    *,
    batch_size: int | None,
    progress: bool,
) -> Means:
    """Averages for each arm of ``measure``, which takes a row's readings of one role in base, plain and blocked.

    read: called once per arm and row, with the activations [tokens d_model] at the sites, before they are split by role.
    """
    sums: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: {arm: {} for arm in ARMS})
    n_rows, n_tokens = Counter[str](), Counter[str]()
    with ExitStack() as stack, progress_bar(total=len(rows), desc="rerouting", show=progress) as bar:
        names = [str(stack.enter_context(model.holding(arm))) for arm in (BASE, *arms)]
        for states, batch in _read_arms(model, sites, rows, names, batch_size or MOST_ROWS):
            for i, real in enumerate(batch.mask):
                found = [read({site: h[i][real] for site, h in of_arm.items()}) for of_arm in states]
                for role, where in batch.roles.items():
                    if (here := where[i][real]).any():
                        n_rows[role] += 1
                        n_tokens[role] += int(here.sum())
                        base, plain, blocked = ({name: values[here] for name, values in of_arm.items()} for of_arm in found)
                        _add(sums[role], measure(base, plain, blocked))
                bar.update()
    return [
        (
            role,
            {"n_rows": n_rows[role], "n_tokens": n_tokens[role]},
            {arm: {name: (total / n_rows[role]).cpu() for name, total in of.items()} for arm, of in sums[role].items()},
        )
        for role in ROLES
        if n_rows[role]
    ]


def _add(sums: dict[str, dict[str, Tensor]], measured: Sequence[dict[str, Tensor]]) -> None:
    for arm, found in zip(ARMS, measured, strict=True):
        for name, value in found.items():
            sums[arm][name] = sums[arm].get(name, 0) + value.double()


def _read_arms(
    model: Model, sites: Sequence[str], rows: Sequence[Encoded], arms: Sequence[str], batch_size: int
) -> Iterator[tuple[list[dict[str, Tensor]], Batch]]:
    """Yield (each arm's site -> activation, batch): one reader per arm, asked in turn while its weights act."""
    readers = [read_sites(model, sites, rows, batch_size=batch_size) for _ in arms]
    for _ in range(0, len(rows), batch_size):
        found = []
        for arm, reader in zip(arms, readers, strict=True):
            with model.using(arm):
                found.append(next(reader))
        states, batch = [states for states, _ in found], found[0][1]
        odd = {site: tuple(h.shape) for site, h in states[0].items() if h.ndim != 3 or h.shape[:2] != batch.ids.shape}
        if odd:
            raise ValueError(f"rerouting: expected sites of [batch pos d_model], got {odd}: take the residual stream, hook_resid_post")
        yield states, batch
