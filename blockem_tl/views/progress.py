"""Progress bars of the library, in notebooks and terminals; BLOCKEM_PROGRESS=0 turns all of them off, whatever ``progress`` says."""

import os
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

VARIABLE = "BLOCKEM_PROGRESS"


def allowed() -> bool:
    """Whether bars may be shown at all."""
    return os.environ.get(VARIABLE, "1").lower() not in ("0", "false", "no", "off")


def progress_bar(iterable: Iterable[Any] | None = None, *, show: bool = True, **options: Any) -> Any:
    """tqdm's bar, which fits the place where it runs; hidden unless ``show`` and `allowed`."""
    return tqdm(iterable, disable=not (show and allowed()), **options)
