"""The cost of patching, in ratios of runs that take turns in one process: prompt patching, decode patching, growth with the reply.

    OMP_NUM_THREADS=1 python experiments/benchmarks/patching_cost.py --json cost.json          # an 8-block Llama of 7M parameters
    python experiments/benchmarks/patching_cost.py --shape llama-3.1-8b --json cost.json       # random weights of the real shape, on a GPU

On a CPU the seconds are those of the one thread, so that other work on the machine counts little. Keys of the JSON:

    sweep_vs_plain        prompt patching over all sites / (number of sites x plain generation of the same prompts); replies of 48 tokens
    long_prompt_speedup   per site one base run and one tuned run (patched by a hook) / the sweep; prompts of 200 tokens, replies of 8
    long_prompt_speedup_stopped   the same with base runs that end at the site, as `base_activations` does
    decode_vs_plain       decode patching at the site in the middle / plain generation; replies of 64 tokens
    decode_window_vs_plain   the same where the window leaves out the last step, so that all blocks of both models must run
    decode_bound          1.2 x (1 + blocks up to the site / blocks)
    decode_growth         decode patching: time per token of a reply of 256 tokens / of 32 tokens
    recompute_growth      the same for recomputing both full prefixes at every step (every 16th step is measured)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from random_llama import random_llama
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from turns import medians, take_turns

from blockem_tl import Prompt, current_step, generate, patch, record
from blockem_tl.analysis.patching.decoding import decode_patching
from blockem_tl.analysis.patching.prompt import prompt_patching_stream
from blockem_tl.data.chat import Batch, encode_prompts, pad
from blockem_tl.models.activations import base_activations
from blockem_tl.models.load import Model
from blockem_tl.storage.files import environment, write_json


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the measurement."""

    shape: Literal["small", "llama-3.1-8b"] = "small"
    prompts: int = 29
    repetitions: int = 3
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None


class Setup:
    """A random model with a random adapter; questions of 8 to 23 words, and long ones."""

    def __init__(self, settings: Settings) -> None:
        self.model: Model = random_llama(settings.shape, adapter="tuned")
        self.sites = [f"blocks.{block}.hook_resid_post" for block in range(self.model.cfg.n_layers)]
        self.groups = [(site,) for site in self.sites]
        self.middle = len(self.sites) // 2 - 1
        self.repetitions = settings.repetitions
        self.short = [_question(p, 8 + p % 16) for p in range(settings.prompts)]
        self.long = [_question(p, 197) for p in range(settings.prompts)]  # 200 tokens with the template's

    # ---------------------------------------------------------------------------------------- prefix

    def sweep(self) -> dict[str, float]:
        """Many sites at once against as many plain generations."""
        seconds = self.interleaved(
            {
                "plain": lambda: generate(self.model, self.short, max_new_tokens=48, progress=False),
                "sweep": lambda: list(prompt_patching_stream(self.model, self.short, self.groups, max_new_tokens=48, progress=False)),
            }
        )
        return {"sweep_vs_plain": seconds["sweep"] / (len(self.sites) * seconds["plain"])}

    def long_prompts(self) -> dict[str, float]:
        """Site by site, as one would do it with hooks, against the sweep; the replies must be equal."""
        sweep = lambda: dict(prompt_patching_stream(self.model, self.long, self.groups, max_new_tokens=8, progress=False))  # noqa: E731
        found, expected = sweep(), self.site_by_site(stopped=False)
        if self.model.device.type == "cpu":
            assert all([g.reply_ids for g in found[(site,)]] == [g.reply_ids for g in expected[site]] for site in self.sites)
        seconds = self.interleaved(
            {
                "sweep": sweep,
                "whole": lambda: self.site_by_site(stopped=False),
                "stopped": lambda: self.site_by_site(stopped=True),
            }
        )
        return {
            "long_prompt_speedup": seconds["whole"] / seconds["sweep"],
            "long_prompt_speedup_stopped": seconds["stopped"] / seconds["sweep"],
        }

    @torch.no_grad()
    def site_by_site(self, *, stopped: bool) -> dict[str, Any]:
        """For each site one base run that keeps its states, and one tuned generation that is patched with them."""
        model, found = self.model, {}
        batch = pad(encode_prompts(model.tokenizer, self.long), model.pad_id, side="left", device=model.device)
        for site in self.sites:
            states = self.base_states(batch, site, stopped)

            def patched(activation: Tensor, hook: HookPoint, states: Tensor = states) -> Tensor | None:
                now = current_step()
                return states[now.rows] if now.is_prompt else None

            found[site] = generate(model, self.long, hooks=[(site, patched)], max_new_tokens=8, progress=False)
        return found

    def base_states(self, batch: Batch, site: str, stopped: bool) -> Tensor:
        """In parts of about 1000 tokens, which is faster on a CPU than all at once."""
        model, parts = self.model, []
        at_once = 5 if model.device.type == "cpu" else len(batch.ids)
        for start in range(0, len(batch.ids), at_once):
            some = slice(start, start + at_once)
            part = Batch(ids=batch.ids[some], mask=batch.mask[some], system=batch.system[some], reply=batch.reply[some])
            if stopped:
                parts.append(base_activations(model, part, [site])[site])
                continue
            store: dict[str, Tensor] = {}
            with model.using("base"):
                model.run_with_hooks(part.ids, fwd_hooks=[record(site, store)], attention_mask=part.mask.long())
            parts.append(store[site])
        return torch.cat(parts)

    # ---------------------------------------------------------------------------------------- decoding

    def decoding(self) -> dict[str, float]:
        """Per token against plain decoding."""
        site, options = [self.sites[self.middle]], {"max_new_tokens": 64, "progress": False}
        seconds = self.interleaved(
            {
                "plain": lambda: generate(self.model, self.short, **options),
                "decode": lambda: decode_patching(self.model, self.short, site, **options),
                "window": lambda: decode_patching(self.model, self.short, site, steps=(0, 63), **options),
            }
        )
        return {
            "decode_vs_plain": seconds["decode"] / seconds["plain"],
            "decode_window_vs_plain": seconds["window"] / seconds["plain"],
            "decode_bound": 1.2 * (1 + (self.middle + 1) / len(self.sites)),
        }

    def growth(self) -> dict[str, float]:
        """Time per token of long replies over short ones, lockstep and recomputing."""
        site = [self.sites[self.middle]]
        seconds = self.interleaved(
            {
                "short": lambda: decode_patching(self.model, self.short, site, max_new_tokens=32, progress=False),
                "long": lambda: decode_patching(self.model, self.short, site, max_new_tokens=256, progress=False),
                "recompute short": lambda: self.recompute(range(16, 33, 16)),
                "recompute long": lambda: self.recompute(range(16, 257, 16)),
            }
        )
        return {
            "decode_growth": (seconds["long"] / 256) / (seconds["short"] / 32),
            "recompute_growth": (seconds["recompute long"] / 16) / (seconds["recompute short"] / 2),
        }

    @torch.no_grad()
    def recompute(self, lengths: range) -> None:
        """One step at each of these reply lengths: both models over the full prefix, base up to the site, tuned with its last state."""
        model, site = self.model, self.sites[self.middle]
        prompts = pad(encode_prompts(model.tokenizer, self.short), model.pad_id, side="left", device=model.device)
        for length in lengths:
            reply = torch.full((len(prompts.ids), length - 1), 9, device=model.device)
            ids, mask = torch.cat([prompts.ids, reply], 1), torch.cat([prompts.mask, reply > 0], 1)
            batch = Batch(ids=ids, mask=mask, system=mask & False, reply=mask & False)
            state = base_activations(model, batch, [site])[site]
            where = torch.zeros_like(mask)
            where[:, -1] = True
            with model.hooks(fwd_hooks=[patch(site, state, where)]):
                inputs: Any = {"attention_mask": mask.long(), "position_ids": batch.positions, "use_cache": False, "logits_to_keep": 1}
                model.hf(input_ids=ids, **inputs)

    # ---------------------------------------------------------------------------------------- turns

    def interleaved(self, contenders: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Median seconds of each; on a CPU those that this process has computed."""
        device = self.model.device
        found = {name: medians(taken) for name, taken in take_turns(contenders, self.repetitions, device).items()}
        shown = {name: one.cpu if device.type == "cpu" else one.wall for name, one in found.items()}
        print({name: round(value, 2) for name, value in shown.items()}, flush=True)
        return shown


def _question(number: int, n_words: int) -> Prompt:
    return Prompt(id=str(number), text=" ".join(f"w{(31 * number + i) % 997}" for i in range(n_words)))


def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    setup = Setup(settings)
    parameters = sum(p.numel() for p in setup.model.original_model.parameters())
    result: dict[str, Any] = {"shape": settings.shape, "parameters": parameters, "prompts": settings.prompts}
    for part in (setup.sweep, setup.long_prompts, setup.decoding, setup.growth):
        found = part()
        result |= found
        print("  ".join(f"{key} {value:.2f}" for key, value in found.items()), flush=True)
    if settings.json_path is not None:
        write_json(settings.json_path, {**result, "environment": environment()})


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
