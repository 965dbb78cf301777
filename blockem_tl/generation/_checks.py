"""What the self-test checks, one function each: it returns what was seen, or raises."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from blockem_tl.data.chat import Encoded
from blockem_tl.data.templates import end_of_turn, template_head
from blockem_tl.generation._decoder import end_tokens_of
from blockem_tl.generation._scheduler import Job, run_job
from blockem_tl.generation.steering import UNSTEERED, Condition, Steering
from blockem_tl.hooks import record, steer
from blockem_tl.models._peft_bridge import linear_kinds
from blockem_tl.models._sources import probe_logits
from blockem_tl.models.load import Model
from blockem_tl.types import Prompt

LONGEST_WINDOW = 300
"""Sliding windows up to this many tokens are tried with a prompt that is longer."""
_ADAPTER = "self-test"


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much a level tries."""

    prompts: tuple[int, ...]
    n_tokens: int
    all_blocks: bool


FAST = Size(prompts=(1, 7, 4), n_tokens=5, all_blocks=False)
FULL = Size(prompts=(1, 13, 4, 2, 9), n_tokens=24, all_blocks=True)


def same_logits(model: Model, *, plain: Float[Tensor, "pos d_vocab"]) -> str:
    """The bridged model's logits are the plain model's."""
    gap = float((probe_logits(model.hf, model.device) - plain).abs().max())
    if not gap <= _tolerance(model, plain):
        raise ValueError(f"the bridged model's logits differ from the plain model's by {gap:.3g}")
    return f"logits of the bridged and the plain model differ by {gap:.1g}"


def steering_acts(model: Model, *, size: Size) -> str:
    """Steering adds its vector at its site, changes the logits, and changes nothing at dose 0."""
    ids, sites = _ids(model, max(size.prompts)), _residual_sites(model, size)
    for site in sites:
        store: dict[str, Tensor] = {}
        unsteered = model.run_with_hooks(ids, fwd_hooks=[record(site, store)])
        stream = store[site]
        direction, scale = _direction(model, 0), float(stream.float().norm(dim=-1).median())
        by_dose = [model.run_with_hooks(ids, fwd_hooks=[steer(site, direction, dose, scale=scale), record(site, store)]) for dose in (0, 2)]
        added = (store[site] - stream).float() - 2 * scale * direction
        if not torch.equal(by_dose[0], unsteered):
            raise ValueError(f"dose 0 at {site} changes the logits")
        if torch.equal(by_dose[1], unsteered) or float(added.abs().max()) > _tolerance(model, stream):
            raise ValueError(f"steering at {site} does not add its vector, or the logits do not change")
    return f"acts at {len(sites)} sites, and dose 0 changes nothing"


def edits_reach_the_logits(model: Model, *, size: Size) -> str:
    """Edits of the residual stream and of what attention and MLP add to it change the logits."""
    ids = _ids(model, max(size.prompts))
    plain, points = model(ids), model.hook_dict
    kinds = ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
    sites = [f"blocks.{block}.{kind}" for block in _blocks(model, size) for kind in kinds if f"blocks.{block}.{kind}" in points]
    deaf = [site for site in sites if torch.equal(model.run_with_hooks(ids, fwd_hooks=[steer(site, _direction(model, 1), 1e3)]), plain)]
    if deaf:
        raise ValueError(f"edits at {deaf} change no logits")
    return f"edits at {len(sites)} sites reach the logits"


def replies_equal_plain_ones(model: Model, *, size: Size) -> str:
    """Cached, left-padded, batched and steered greedy replies are those of plain greedy decoding, row by row and without a cache."""
    lengths = [*size.prompts, *([window + 4] if (window := _window(model, size)) else [])]
    prompts = [tuple(_ids(model, length, seed=i)[0].tolist()) for i, length in enumerate(lengths)]
    sites = _residual_sites(model, FAST)
    steered = [Steering(site=site, direction=_direction(model, i), dose=1.0, scale=_scale(model, site)) for i, site in enumerate(sites)]
    last = [Condition(name="last", steering=(steered[-1],)), Condition(name="all", steering=tuple(steered))]
    conditions = [UNSTEERED, *last]
    job = Job(
        model=model,
        prompts=[Prompt(id=str(i), text=str(i)) for i in range(len(prompts))],
        encoded=[Encoded(ids=ids, n_system=0, n_prompt=len(ids)) for ids in prompts],
        conditions=conditions,
        hooks=(),
        sites=[steering.site for steering in steered],
        limits=[size.n_tokens] * len(prompts),
        temperature=0.0,
        seed=0,
    )
    replies = dict(run_job(job, max(2, len(prompts)), progress=False))
    for c, condition in enumerate(conditions):
        for ids, reply in zip(prompts, replies[c], strict=True):
            _check_reply(model, ids, condition, reply.reply_ids, size.n_tokens)
    return f"{len(prompts) * len(conditions)} replies equal plain ones"


def turns_end(model: Model) -> str:
    """The token that training teaches at the end of a reply ends one."""
    taught = end_of_turn(model.tokenizer)
    if taught is None:
        return "the chat template teaches no end, or there is none"
    if taught not in end_tokens_of(model):
        raise ValueError(
            f"training teaches the token {model.tokenizer.convert_ids_to_tokens(taught)!r} at the end, and no reply ends with it"
        )
    return f"replies end with {model.tokenizer.convert_ids_to_tokens(taught)!r}"


def renders_the_same_tomorrow(model: Model) -> str:
    """The chat template writes nothing that depends on the day."""
    if not model.tokenizer.chat_template:
        return "there is no chat template"
    head, now = template_head(model.tokenizer), datetime.now()
    found = [day for day in (now.strftime("%d %b %Y"), now.strftime("%Y-%m-%d"), now.strftime("%B %d, %Y")) if day in head]
    if found or head != template_head(model.tokenizer):
        raise ValueError(f"the chat template writes the day, {found}, before the question: {head[-200:]!r}")
    return "no day in it"


def adapters_come_and_go(model: Model) -> str:
    """A LoRA adapter changes the logits; without it they are the plain ones, to the last bit."""
    if model.adapters:
        return "not checked: the model holds adapters already"
    ids, kinds = _ids(model, 8), linear_kinds(model.original_model)
    plain = model(ids)
    targets = [kind for kind in kinds if _takes_lora(model, [kind])]
    if not targets:
        return f"LoRA is refused on all linear modules ({', '.join(kinds)})"
    with torch.enable_grad():
        model.add_adapter(_ADAPTER, rank=2, target_modules=targets)
    try:
        for i, parameter in enumerate(model.adapter_parameters(_ADAPTER)):
            generator = torch.Generator().manual_seed(i)
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1
        tuned = model(ids)
        with model.using("base"):
            base = model(ids)
    finally:
        model.remove_adapter(_ADAPTER)
    if torch.equal(tuned, plain) or not torch.equal(base, plain) or not torch.equal(model(ids), plain):
        raise ValueError("an adapter changes nothing, or the model is another one without it")
    refused = [kind for kind in kinds if kind not in targets]
    return f"LoRA on {', '.join(targets)} comes and goes" + (f"; it is refused on {', '.join(refused)}" if refused else "")


def _takes_lora(model: Model, targets: Sequence[str]) -> bool:
    """Whether an adapter on these modules would act; the bridge bypasses some, and `add_adapter` refuses them."""
    try:
        with torch.enable_grad():
            model.add_adapter(_ADAPTER, rank=1, target_modules=targets)
    except (ValueError, RuntimeError):
        return False
    model.remove_adapter(_ADAPTER)
    return True


# ---------------------------------------------------------------------------------------------- pieces


def _check_reply(model: Model, ids: Sequence[int], condition: Condition, reply: Sequence[int], n_tokens: int) -> None:
    """Raise ValueError unless every token of the reply is the likeliest after those before it, in one plain forward over all of them.

    A tie, within rounding, ends the comparison.
    """
    tokens = torch.tensor([[*ids, *reply]], device=model.device)
    with model.hooks(fwd_hooks=condition.hooks()):
        logits = cast(Any, model.hf)(input_ids=tokens, use_cache=False).logits[0, len(ids) - 1 :].float()
    stops, best = set(end_tokens_of(model)), logits.argmax(-1).tolist()
    for i, token in enumerate([*reply, None][:n_tokens]):
        ended = token is None and best[i] in stops
        if token != best[i] and not ended:
            if token is not None and float(logits[i, best[i]] - logits[i, token]) <= _tolerance(model, logits[i]):
                return
            raise ValueError(
                f"a batched, cached reply differs from the plain one at token {i + 1} of {n_tokens} (condition {condition.name!r}, a "
                f"prompt of {len(ids)} tokens)"
            )


def _ids(model: Model, length: int, seed: int = 0) -> Tensor:
    """Token ids that are no control tokens, [1 length]."""
    generator = torch.Generator().manual_seed(seed)
    special = {*model.tokenizer.all_special_ids, *end_tokens_of(model)}
    allowed = [i for i in range(min(int(model.cfg.d_vocab), 4096)) if i not in special]
    chosen = torch.randint(len(allowed), (length,), generator=generator)
    return torch.tensor([[allowed[i] for i in chosen.tolist()]], device=model.device)


def _blocks(model: Model, size: Size) -> list[int]:
    n_layers = int(model.cfg.n_layers)
    return list(range(n_layers)) if size.all_blocks else sorted({n_layers // 2, n_layers - 1})


def _residual_sites(model: Model, size: Size) -> list[str]:
    return [f"blocks.{block}.hook_resid_post" for block in _blocks(model, size)]


def _direction(model: Model, seed: int) -> Float[Tensor, " d_model"]:
    direction = torch.randn(int(model.cfg.d_model), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(direction, dim=0).to(model.device)


def _scale(model: Model, site: str) -> float:
    store: dict[str, Tensor] = {}
    model.run_with_hooks(_ids(model, 7), fwd_hooks=[record(site, store)])
    return float(store[site].float().norm(dim=-1).median())


def _window(model: Model, size: Size) -> int:
    """The smallest sliding window of the architecture that a prompt can exceed here; 0 for none."""
    config = cast(Any, model.original_model).config
    named = [getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size")]
    most = min(LONGEST_WINDOW, int(model.cfg.n_ctx) - size.n_tokens - 20)
    return min((window for window in named if isinstance(window, int) and 0 < window <= most), default=0)


def _tolerance(model: Model, values: Tensor) -> float:
    """Rounding of the model's dtype, on the scale of the values."""
    single = next(model.original_model.parameters()).dtype in (torch.float32, torch.float64)
    return (2e-4 if single else 4e-2) * max(1.0, float(values.float().abs().max()))
