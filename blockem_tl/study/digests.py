"""Which data a study's work was done on, by contents: rows, prompts or pairs that were edited since are other ones, and not mixed with it.

Data that are not here, as on a machine that only draws a study's tables, have no digest: `manifest.believed`.
"""

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from blockem_tl.storage.fingerprints import of_value
from blockem_tl.study.inputs import PromptSplit
from blockem_tl.study.manifest import DIGEST
from blockem_tl.study.run import Point
from blockem_tl.study.setting import Setting


def of_step(setting: Setting, function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, str]:
    """Of the prompts and pairs that a step reads: those of its option ``split``, if it has one."""
    default = inspect.signature(function).parameters.get("split")
    split = options.get("split", default.default if default else None)
    if split not in get_args(PromptSplit):
        return {}
    try:
        prompts = setting.inputs.prompts(split, setting.domain)
    except ValueError:  # not in the cache
        return {}
    pairs = []
    with contextlib.suppress(ValueError):  # these data have none
        pairs = setting.inputs.pairs(split, setting.domain)
    return {f"{DIGEST}{split}": of_value([prompts, pairs])[:16]}


def of_rows(setting: Setting, points: Sequence[Point]) -> dict[Point, dict[str, str]]:
    """Of the rows that each run trains on, and of those that its losses are measured on."""
    drawn = {(point.run.domain or setting.domain, point.seed): {} for point in points}
    for domain, seed in drawn:
        with contextlib.suppress(ValueError):  # not in the cache
            drawn[domain, seed] = {f"{DIGEST}rows": of_value(setting.inputs.rows(domain, True, seed))[:16]}
    return {point: drawn[point.run.domain or setting.domain, point.seed] for point in points}
