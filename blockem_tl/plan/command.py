"""`blockem plan`: does a preset fit a card?"""

# Heavy imports stand inside, as in `blockem_tl.cli`.
import re
from typing import Annotated

import tyro

Preset = Annotated[str, tyro.conf.arg(metavar="PRESET")]


def plan(
    preset: tyro.conf.Positional[Preset],
    /,
    *,
    gpu: Annotated[str, tyro.conf.arg(metavar="GB")] = "80GB",
    tokens: int = 400,
    new_tokens: int | None = None,
) -> None:
    """Reckon what training, losses and replies of a preset take on a card, and the largest batches that fit, before anything is rented.

    It runs the library's own code on tensors without data: no GPU and no weights, and half a minute for eight billion parameters.

    Args:
        preset: see `blockem presets`.
        gpu: the card's memory, as 80GB.
        tokens: of a training row, prompt and completion.
        new_tokens: of a reply; the preset's by default.
    """
    from blockem_tl.plan.estimate import plan_memory
    from blockem_tl.presets import get_preset
    from blockem_tl.views.tables import show

    found = plan_memory(get_preset(preset), gpu_gb=gigabytes(gpu), tokens=tokens, new_tokens=new_tokens)
    rows = [
        {
            "stage": stage.stage,
            "batch": f"{stage.batch}",
            "resident": f"{stage.resident:.1f}",
            "work": f"{stage.work:.1f}",
            "total GB": f"{stage.total:.1f}",
            "fits": "yes" if stage.fits else "no",
        }
        for stage in found.stages
    ]
    show(rows, f"{preset} on {found.gpu_gb:g} GB, rows of {tokens} tokens")


def gigabytes(text: str) -> float:
    """80 of "80", "80GB" or "80 GiB". Raises ValueError for anything else."""
    read = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:gi?b)?\s*", text, re.IGNORECASE)
    if read is None or not float(read[1]) > 0:
        raise ValueError(f"plan: expected the card's memory as 80GB, got {text!r}")
    return float(read[1])
