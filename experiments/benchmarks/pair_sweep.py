"""The patching sweep by contrastive pairs against one run per site and window, in turns: equal margins, and how much cheaper.

    python experiments/benchmarks/pair_sweep.py --preset smollm2-135m --adapter runs/plain --json sweep.json

A run by hand records base's state at one site, stopping there, and runs the whole tuned model with that state patched in. On a CPU
the seconds are those that the process has computed.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import tyro
from turns import medians, take_turns

from blockem_tl import Setting, finetune, pair_patching, patch
from blockem_tl.data.chat import encode_examples, pad
from blockem_tl.evaluation.preference import mean_log_likelihood, sides
from blockem_tl.models.activations import base_activations
from blockem_tl.storage import files
from blockem_tl.study.stages import tuned_at


@dataclass(frozen=True, kw_only=True)
class Options:
    """adapter: the tuned model, as `blockem finetune` leaves it; None trains the preset's plain fine-tune.  pairs: of core, all areas as
    evenly as it allows."""

    preset: str = "smollm2-135m"
    adapter: Path | None = None
    pairs: int = 4
    repetitions: int = 1
    json: Annotated[Path | None, tyro.conf.arg(name="json")] = None


def main(options: Options) -> dict[str, Any]:
    setting = Setting.of(options.preset)
    model, pairs = setting.model, setting.pairs("core", options.pairs)
    if options.adapter is None:
        finetune(model, setting.rows(), config=setting.training, adapter="tuned")
    else:
        model.load_adapter(tuned_at(options.adapter).adapter, "tuned")
    sites = [f"blocks.{block}.hook_resid_post" for block in range(model.cfg.n_layers)]
    batch = pad(encode_examples(model.tokenizer, sides(pairs)), model.pad_id, side="right", device=model.device)
    windows = {"prompt": batch.mask & ~batch.reply, "decode": batch.reply}

    found: dict[str, np.ndarray] = {}

    def sweep() -> None:
        found["sweep"] = pair_patching(model, pairs, sites, target="tuned", batch_size=len(batch.ids), progress=False).margins[1:]

    def by_hand() -> None:
        found["by hand"] = np.array([margins(site, window) for window in windows.values() for site in sites])

    @torch.no_grad()
    def margins(site: str, window: torch.Tensor) -> np.ndarray:
        state = base_activations(model, batch, [site])[site]
        with model.using("tuned"), model.hooks(fwd_hooks=[patch(site, state, window)]):
            logits = cast(Any, model)(batch.ids, attention_mask=batch.mask.long())
        nats = mean_log_likelihood(logits, batch).cpu().numpy()
        return nats[: len(pairs)] - nats[len(pairs) :]

    seconds = take_turns({"sweep": sweep, "by hand": by_hand}, options.repetitions, model.device)
    taken = {name: one.cpu if model.device.type == "cpu" else one.wall for name, one in ((n, medians(s)) for n, s in seconds.items())}
    result = {
        "sites": len(sites),
        "pairs": len(pairs),
        "largest_difference_nats": float(np.abs(found["sweep"] - found["by hand"]).max()),
        "seconds_sweep": taken["sweep"],
        "by_hand_vs_sweep": taken["by hand"] / taken["sweep"],
    }
    print(json.dumps(result, indent=2))
    if options.json is not None:
        files.write_json(options.json, {**result, "environment": files.environment()})
    return result


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
