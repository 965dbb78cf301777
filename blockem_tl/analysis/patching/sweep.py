"""`patching_sweep`: another model's states at site after site, over the prompt or at every decoding step (paper, section 5 and F.1)::

    replies = patching_sweep(model, prompts, when=["prompt", "decode"]).grade(judge)
    replies.rates(by=["patched", "site"])
    replies.plot()

"prompt" patches all positions of the prompt and lets the reply run unpatched; "decode" patches the newest position at every decoding step.
The replies have the columns patched ("prompt", "decode", "unpatched"), site (several names joined by " + ", or "unpatched"), block (its
number; None where there is not just one) and direction ("base into tuned"). Components are ``blocks.N.hook_attn_out`` and
``blocks.N.hook_mlp_out``. ``source="tuned", target="base"`` is the reverse direction; a model that was fully fine-tuned is a ``source`` of
its own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from blockem_tl.analysis.patching.decoding import decode_patching
from blockem_tl.analysis.patching.endpoints import UNPATCHED, choose_endpoints, sweep_columns
from blockem_tl.analysis.patching.prompt import prompt_patching_stream
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
    """Replies of the target with source's states patched in, site by site, in one table.

    Args:
        sites: hook names, patched one after the other; None without ``groups``: ``hook_resid_post`` of every block, the paper's sweep.
        groups: sites that are patched together.
        when: "prompt", "decode" (see `decode_patching`), or both.
        unpatched: add the target's own replies, for comparison.
        source: whose states: "base", an adapter by name or in a folder, or another model as it stands.
        target: the weights that are patched and reply; None: the model as it stands.
        max_new_tokens, batch_size, temperature, seed: as for `generate_stream`.

    Raises:
        ValueError: source equal to target, models that do not share their tokens, a site that one of them lacks or that is not
            [batch pos d_model], or bad prompts; before any work.
    """
    chosen, kinds = checked_sweep(model, sites, groups, when)
    options: dict[str, Any] = {
        "source": source,
        "target": target,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "temperature": temperature,
        "seed": seed,
        "progress": progress,
    }
    return _swept(model, prompts, chosen, kinds, unpatched, options)


def checked_sweep(
    model: Model, sites: Sequence[str] | None, groups: Sequence[Sequence[str]], when: When | Sequence[When]
) -> tuple[list[tuple[str, ...]], list[When]]:
    """The groups of sites and the kinds that are meant. Raises as `patching_sweep`."""
    kinds: list[When] = [when] if isinstance(when, str) else list(when)  # pyright: ignore[reportAssignmentType]
    if not kinds or set(kinds) - {"prompt", "decode"} or isinstance(sites, str):
        raise ValueError(
            f"patching: expected when='prompt', 'decode' or ['prompt', 'decode'], and a list of sites, got {when!r} and {sites!r}"
        )
    if sites is None and not groups:
        sites = [f"blocks.{block}.hook_resid_post" for block in range(model.cfg.n_layers)]
    chosen = [*((site,) for site in sites or ()), *(tuple(group) for group in groups)]
    if not chosen:
        raise ValueError("patching: expected at least one site to patch, got none")
    if wrong := [site for group in chosen for site in group if not isinstance(site, str)]:
        raise TypeError(f"patching: expected hook names such as 'blocks.2.hook_resid_post' as sites, got {wrong}")
    return chosen, kinds


def _swept(
    model: Model, prompts: Sequence[Prompt], groups: list[tuple[str, ...]], kinds: list[When], unpatched: bool, options: dict[str, Any]
) -> Replies:
    over_prompt = [*([()] if unpatched else []), *(groups if "prompt" in kinds else [])]
    by_group = dict(prompt_patching_stream(model, prompts, over_prompt, **options)) if over_prompt else {}
    found: list[Generation] = [generation for group in over_prompt for generation in by_group[group]]
    patched = ["prompt" if group else UNPATCHED for group in over_prompt for _ in prompts]
    ends = choose_endpoints(model, options["source"], options["target"])
    columns = sweep_columns(*ends, over_prompt, len(prompts))
    if "decode" in kinds:
        decoded = decode_patching(model, prompts, groups=groups, **options)
        found, patched = [*found, *decoded], [*patched, *decoded.columns["patched"]]
        columns = {name: [*values, *decoded.columns[name]] for name, values in columns.items()}
    return Replies.of(found, patched=patched, **columns)
