"""`patching_sweep`: another model's states at site after site, over the prompt or at every decoding step, in one table of replies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from blockem_tl.analysis.patching.decoding import decode_patching
from blockem_tl.analysis.patching.prompt import UNPATCHED, prompt_patching_stream
from blockem_tl.generation.replies import Replies
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.types import Generation, Prompt

When = Literal["prompt", "decode"]


def patching_sweep(
    model: Model,
    prompts: Sequence[Prompt],
    sites: Sequence[str] | None = None,
    *,
    groups: Sequence[Sequence[str]] = (),
    when: When | Sequence[When] = "prompt",
    unpatched: bool = True,
    source: str | Path | Model = BASE,
    target: str | Path | None = None,
    max_new_tokens: int | Sequence[int] = 64,
    batch_size: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    progress: bool = True,
) -> Replies:
    """Replies of the target with source's states patched in, site by site (paper, section 5 and F.1)::

        replies = patching_sweep(model, prompts, when=["prompt", "decode"]).grade(judge)
        replies.rates(by=["patched", "site"])
        replies.plot()

    Returns:
        Replies with the columns site (several names joined by " + ", or "unpatched") and patched ("prompt", "decode", "nothing").

    Args:
        sites: hook names, patched one after the other; None without ``groups``: ``hook_resid_post`` of every block, the paper's sweep.
            Components are ``blocks.N.hook_attn_out`` and ``blocks.N.hook_mlp_out``.
        groups: sites that are patched together.
        when: "prompt" patches all positions of the prompt and lets the reply run unpatched; "decode" patches the newest position at every
            decoding step, see `decode_patching`. Both are compared by giving both.
        unpatched: add the target's own replies, for comparison.
        source: the model whose states are taken: "base", an adapter by name or in a folder, or another model (as it stands), for instance
            one that was fully fine-tuned.
        target: the weights that are patched and reply; None: the model as it stands. ``source="tuned", target="base"`` is the reverse
            direction.
        batch_size: rows that run at once; None asks the free memory.
        max_new_tokens, temperature, seed: as for `generate_stream`.

    Raises:
        ValueError: source equal to target, models that do not share their tokens, a site that one of them lacks or that is not
            [batch pos d_model], or bad prompts; before any work.
    """
    kinds = [when] if isinstance(when, str) else list(when)
    if not kinds or set(kinds) - {"prompt", "decode"} or isinstance(sites, str):
        raise ValueError(f"patching: expected when among 'prompt' and 'decode', and a list of sites, got {when!r} and {sites!r}")
    if sites is None and not groups:
        sites = [f"blocks.{block}.hook_resid_post" for block in range(model.cfg.n_layers)]
    chosen = [*((site,) for site in sites or ()), *(tuple(group) for group in groups)]
    if not chosen:
        raise ValueError("patching: expected at least one site to patch, got none")
    options: dict[str, Any] = {
        "source": source,
        "target": target,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "temperature": temperature,
        "seed": seed,
        "progress": progress,
    }
    over_prompt = [*([()] if unpatched else []), *(chosen if "prompt" in kinds else [])]
    by_group = dict(prompt_patching_stream(model, prompts, over_prompt, **options)) if over_prompt else {}
    found: list[Generation] = [generation for group in over_prompt for generation in by_group[group]]
    site = [" + ".join(group) or UNPATCHED for group in over_prompt for _ in prompts]
    patched = ["prompt" if group else "nothing" for group in over_prompt for _ in prompts]
    if "decode" in kinds:
        decoded = decode_patching(model, prompts, groups=chosen, **options)
        found, site, patched = [*found, *decoded], [*site, *decoded.columns["site"]], [*patched, *decoded.columns["patched"]]
    return Replies.of(found, site=site, patched=patched)
