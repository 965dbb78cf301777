"""Checks of what is asked for, before anything is generated: prompts, conditions, token limits, and sites that can be steered."""

from collections.abc import Sequence

import torch
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedTokenizerBase

from blockem_tl.data.chat import Encoded, check_lengths, encode_prompts
from blockem_tl.generation.steering import Condition
from blockem_tl.hooks import resolve
from blockem_tl.models.load import Model
from blockem_tl.types import Prompt


def check_prompt_indices(prompt_indices: Sequence[Sequence[int]] | None, n_conditions: int, n_prompts: int) -> list[list[int]]:
    """The prompts that each condition asks. Raises ValueError unless each asks at least one, none twice, and only what there is."""
    if prompt_indices is None:
        return [list(range(n_prompts)) for _ in range(n_conditions)]
    wrong = [part for part in prompt_indices if not part or len(set(part)) < len(part) or not set(part) <= set(range(n_prompts))]
    if wrong or len(prompt_indices) != n_conditions:
        raise ValueError(
            f"prompt_indices: expected for each of {n_conditions} conditions some distinct indices in 0..{n_prompts - 1}, got "
            f"{list(wrong[0])[:5] if wrong else f'{len(prompt_indices)} lists'}"
        )
    return [list(part) for part in prompt_indices]


def is_count(value: object, *, least: int = 1) -> bool:
    """Whether the value is a whole number of at least ``least`` (and not a truth value, which Python counts among them)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_request(
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    prompts: Sequence[Prompt],
    conditions: Sequence[Condition],
    max_new_tokens: int | Sequence[int],
    temperature: float,
    seed: int,
) -> tuple[list[Encoded], list[int]]:
    """The encoded prompts and the token limit of each, of a request that any engine can serve in a ``context`` of so many tokens.

    Raises:
        ValueError: what is wrong with the request.
    """
    encoded = encode_prompts(tokenizer, prompts)
    limits = list(max_new_tokens) if isinstance(max_new_tokens, Sequence) else [max_new_tokens] * len(prompts)
    if len(limits) != len(prompts) or not all(is_count(limit) for limit in limits):
        raise ValueError(f"max_new_tokens: expected a whole number >= 1, or one per prompt ({len(prompts)}), got {max_new_tokens!r}")
    for row, limit in zip(encoded, limits, strict=True):
        check_lengths([row], context, room=limit)
    if isinstance(conditions, Condition) or not all(isinstance(condition, Condition) for condition in conditions):
        raise TypeError(f"conditions: expected a list of Condition(name=..., steering=(...)), got {str(conditions)[:80]}")
    names = [condition.name for condition in conditions]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected at least one condition and distinct condition names, got {names[:5]}")
    if not 0 <= temperature < float("inf") or not is_count(seed, least=0):
        raise ValueError(f"expected a finite temperature >= 0 and a whole number >= 0 as seed, got {temperature!r} and {seed!r}")
    return encoded, limits


def steered_sites(model: Model, conditions: Sequence[Condition]) -> list[str]:
    """Every site that is steered, each proven on one token to be a place where a direction can be added."""
    points, d_model = model.hook_dict, model.cfg.d_model
    dtype = next(model.original_model.parameters()).dtype
    sites: dict[str, None] = {}
    for condition in conditions:
        for steering in condition.steering:
            if not torch.isfinite(steering.vector.to(dtype)).all():
                raise ValueError(f"condition {condition.name!r}: its vector at {steering.site} overflows {dtype}: lower the dose")
            if steering.site not in sites:
                resolve(points, steering.site)
                sites[steering.site] = None
            if steering.direction.shape != (d_model,):
                raise ValueError(
                    f"condition {condition.name!r}: expected a direction of shape ({d_model},) for {steering.site}, "
                    f"got {tuple(steering.direction.shape)}"
                )
    probe_sites(model, list(sites))
    return list(sites)


@torch.no_grad()
def probe_sites(model: Model, sites: Sequence[str]) -> None:
    """Raise ValueError unless every site is [batch pos d_model] and can be edited: one token is run to prove it."""
    d_model = model.cfg.d_model

    def probe(activation: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        if activation.shape != (1, 1, d_model):
            raise ValueError(
                f"site {hook.name} cannot be steered or patched: expected [batch pos {d_model}] there, got {tuple(activation.shape)} for "
                "one token; take the residual stream, e.g. blocks.N.hook_resid_post"
            )
        return activation

    if sites:
        with model.hooks(fwd_hooks=[(site, probe) for site in sites]):
            model.hf(input_ids=torch.full((1, 1), model.pad_id, device=model.device), use_cache=False)
