"""Rows that wait, rows that run: one stream of KV-cached rows for many conditions and prompts.

Every row carries its own condition (a direction and a dose), finished rows leave the batch and waiting ones take their places, and
positions are those of the unpadded row: a batched reply equals the reply generated alone, token for token.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedTokenizerBase

from blockem_tl.data.chat import Encoded, check_lengths, encode_prompts
from blockem_tl.generation._decoder import Decoder, Reply, Row
from blockem_tl.generation._memory import fitting, is_out_of_memory
from blockem_tl.generation._shared_prefill import SHARED_TOKENS, SharedDecoder, prefill_tokens
from blockem_tl.generation.steering import Condition
from blockem_tl.hooks import Hook, resolve
from blockem_tl.models.activations import block_of
from blockem_tl.models.load import Model
from blockem_tl.types import Generation, Prompt


def check_parts(parts: Sequence[Sequence[int]] | None, n_conditions: int, n_prompts: int) -> list[list[int]]:
    """The prompts that each condition asks. Raises ValueError unless each asks at least one, none twice, and only what there is."""
    if parts is None:
        return [list(range(n_prompts)) for _ in range(n_conditions)]
    wrong = [part for part in parts if not part or len(set(part)) < len(part) or not set(part) <= set(range(n_prompts))]
    if wrong or len(parts) != n_conditions:
        raise ValueError(
            f"parts: expected for each of {n_conditions} conditions some distinct indices in 0..{n_prompts - 1}, got {len(parts)} parts, "
            f"e.g. {list(wrong[0])[:5] if wrong else 'too few or too many'}"
        )
    return [list(part) for part in parts]


REFILL_SHARE = 1 / 8
"""Of the places in a batch, how many have to be free before waiting rows join: a prefill costs about as much as a step or two."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What was asked for, checked. decoder_type: what makes the decoder; another one runs the rows in another way (see `patching/`).

    adapter: which weights act, as for `LiveAdapters.using`.
    prefill_order: which of the rows that join together are prefilled together: neighbours under this key.
    """

    model: Model
    prompts: Sequence[Prompt]
    encoded: Sequence[Encoded]
    conditions: Sequence[Condition]
    hooks: Sequence[Hook]
    sites: Sequence[str]
    limits: Sequence[int]
    temperature: float
    seed: int
    parts: Sequence[Sequence[int]] | None = None
    adapter: str | Path | None = None
    decoder_type: Callable[..., Decoder] = Decoder
    prefill_order: Callable[[Row], Any] = lambda row: len(row.encoded.ids)

    @property
    def longest(self) -> int:
        return max(len(encoded.ids) + limit for encoded, limit in zip(self.encoded, self.limits, strict=True))

    def part(self, condition: int) -> Sequence[int]:
        """Which prompts a condition asks."""
        return range(len(self.prompts)) if self.parts is None else self.parts[condition]

    @property
    def n_rows(self) -> int:
        return sum(len(self.part(c)) for c in range(len(self.conditions)))

    def rows(self) -> Iterator[Row]:
        """Condition by condition, so that conditions finish one after the other; inside one, equal lengths together: less padding."""
        for c, condition in enumerate(self.conditions):
            for p in sorted(self.part(c), key=lambda p: len(self.encoded[p].ids)):
                own = blake2b(f"{condition.name}\0{self.prompts[p].id}".encode(), digest_size=8).digest()
                yield Row(
                    place=c * len(self.prompts) + p,
                    encoded=self.encoded[p],
                    condition=condition,
                    limit=self.limits[p],
                    seed=(self.seed, int.from_bytes(own, "big")),
                )

    def decoder(self, size: int) -> Decoder:
        """What runs ``size`` rows at once."""
        decoder_type, first = self.decoder_type, self.shared_below(size)
        if first > 0:
            asked = {p: self.encoded[p] for p in self.asked}
            decoder_type = partial(SharedDecoder, first=first, prompts=asked, n_prompts=len(self.prompts))
        return decoder_type(
            self.model, self.sites, size=size, longest=self.longest, longest_reply=max(self.limits), temperature=self.temperature
        )

    @property
    def asked(self) -> list[int]:
        """The prompts that any condition asks."""
        return sorted({p for c in range(len(self.conditions)) for p in self.part(c)})

    def shared_below(self, size: int) -> int:
        """The block below which all conditions share a prompt's prefill; 0 where that is impossible, saves nothing, or takes more memory
        than the keys and values of the rows that run."""
        n_tokens = len(self.asked) * max(len(self.encoded[p].ids) for p in self.asked)
        watched = self.hooks or any(point.fwd_hooks for point in self.model.hook_dict.values())  # and may want to see every row
        if watched or self.decoder_type is not Decoder or self.n_rows < 2 * len(self.asked):
            return 0
        if len(self.asked) > size or n_tokens > SHARED_TOKENS:
            return 0
        return min((block_of(str(self.model.hook_dict[site].name)) or 0 for site in self.sites), default=0)

    def generation(self, reply: Reply) -> Generation:
        text = str(self.model.tokenizer.decode(reply.ids, skip_special_tokens=True)).strip()
        prompt = self.prompts[reply.row.place % len(self.prompts)]
        return Generation(prompt=prompt, condition=reply.row.condition.name, reply=text, reply_ids=reply.ids, truncated=reply.truncated)


def make_job(
    model: Model,
    prompts: Sequence[Prompt],
    conditions: Sequence[Condition],
    hooks: Iterable[Hook],
    max_new_tokens: int | Sequence[int],
    temperature: float,
    seed: int,
    parts: Sequence[Sequence[int]] | None = None,
    adapter: str | Path | None = None,
) -> Job:
    """A checked job of `generate_stream`'s arguments. Raises ValueError as that does, before anything is generated."""
    model.check_adapter(adapter)
    encoded, limits = check_request(model.tokenizer, model.cfg.n_ctx, prompts, conditions, max_new_tokens, temperature, seed)
    return Job(
        model=model,
        prompts=prompts,
        encoded=encoded,
        conditions=conditions,
        hooks=list(hooks),
        sites=_checked_sites(model, conditions),
        limits=limits,
        temperature=temperature,
        seed=seed,
        parts=None if parts is None else check_parts(parts, len(conditions), len(prompts)),
        adapter=adapter,
    )


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
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else [int(limit) for limit in max_new_tokens]
    if len(limits) != len(prompts) or min(limits) < 1:
        raise ValueError(f"max_new_tokens: expected one number >= 1, or one per prompt ({len(prompts)}), got {max_new_tokens}")
    for row, limit in zip(encoded, limits, strict=True):
        check_lengths([row], context, room=limit)
    names = [condition.name for condition in conditions]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected at least one condition and distinct condition names, got {names[:5]}")
    if temperature < 0 or seed < 0:
        raise ValueError(f"expected temperature >= 0 and seed >= 0, got {temperature} and {seed}")
    return encoded, limits


def _checked_sites(model: Model, conditions: Sequence[Condition]) -> list[str]:
    """Every site that is steered, each proven on one token to be a place where a direction can be added."""
    points, d_model = model.hook_dict, model.cfg.d_model
    sites: dict[str, None] = {}
    for condition in conditions:
        for steering in condition.steering:
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


def run_job(job: Job, batch_size: int | None, *, refill: bool = True, progress: bool = True) -> Iterator[tuple[int, list[Generation]]]:
    """Check ``batch_size``, then yield (index of the condition, its replies) as `generate_stream` does."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"expected batch_size >= 1 or None, got {batch_size}")
    return _held(job, min(batch_size or fitting(job.model, job.longest), job.n_rows), refill, progress)


def _held(job: Job, size: int, refill: bool, progress: bool) -> Iterator[tuple[int, list[Generation]]]:
    """The loop, with an adapter from a folder loaded once."""
    with job.model.holding(job.adapter) as name:
        yield from _finished_conditions(replace(job, adapter=name), size, refill, progress)


def _finished_conditions(job: Job, size: int, refill: bool, progress: bool) -> Iterator[tuple[int, list[Generation]]]:
    """The loop: run until conditions finish, yield them with the model as it was, go on; halve the batch where memory runs out."""
    n, waiting, decoder = len(job.prompts), _Waiting(job.rows(), job.prefill_order), job.decoder(size)
    open_conditions: dict[int, dict[int, Generation]] = {}
    with tqdm(total=job.n_rows, desc="replies", disable=not progress) as bar:
        while waiting or decoder.n:
            ready: list[tuple[int, list[Generation]]] = []
            failed = None
            try:
                with torch.no_grad(), job.model.using(job.adapter), decoder.attached(job.hooks):
                    while not ready and (waiting or decoder.n):
                        for reply in _advance(decoder, waiting, refill):
                            c, p = divmod(reply.row.place, n)
                            replies = open_conditions.setdefault(c, {})
                            replies[p] = job.generation(reply)
                            bar.update()
                            if len(replies) == len(job.part(c)):
                                ready.append((c, [replies[p] for p in job.part(c)]))
                                del open_conditions[c]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failed = str(error)
            if failed is not None:  # outside of the except block, where the error would still hold the tensors
                size = _halved(size, job.longest, failed)
                waiting.put_back(decoder.rows)
                decoder = None  # frees its cache before the next is made
                clear_device_cache(garbage_collection=True)
                decoder = job.decoder(size)
            yield from ready


def _advance(decoder: Decoder, waiting: "_Waiting", refill: bool) -> list[Reply]:
    """Let waiting rows join where enough places are free for that to be worth a prefill; otherwise one token for every row."""
    free = decoder.size - decoder.n
    if waiting and (decoder.n == 0 or waiting.next or (refill and free >= REFILL_SHARE * decoder.size)):
        return decoder.join(waiting.batch(free, prefill_tokens(decoder.model)))
    return decoder.step()


def _halved(size: int, longest: int, error: str) -> int:
    if size == 1:
        raise MemoryError(
            f"not even one row of {longest} tokens fits into memory: shorten max_new_tokens or the prompts, or free memory. {error}"
        )
    warnings.warn(
        f"out of memory with {size} rows at once: going on with {size // 2} (nothing is lost; pass batch_size to start there)", stacklevel=4
    )
    return size // 2


class _Waiting:
    """Rows that wait, in order; those that are put back come first. ``next``: those that join now, in the order of ``key``."""

    def __init__(self, rows: Iterator[Row], key: Callable[[Row], Any]) -> None:
        self.rows, self.key, self.returned, self.next = rows, key, deque[Row](), deque[Row]()

    def __bool__(self) -> bool:
        if not self.returned and not self.next:
            self.returned.extend(islice(self.rows, 1))
        return bool(self.returned or self.next)

    def put_back(self, rows: Iterable[Row]) -> None:
        self.returned.extendleft(sorted([*rows, *self.next], key=lambda row: row.place, reverse=True))
        self.next.clear()

    def batch(self, free: int, tokens: int) -> list[Row]:
        """Rows of like lengths to prefill together: at most ``tokens`` tokens with padding, at least one row."""
        if not self.next:
            rows = [self.returned.popleft() for _ in range(min(free, len(self.returned)))]
            rows += islice(self.rows, free - len(rows))
            self.next.extend(sorted(rows, key=self.key))
        batch = [self.next.popleft()]
        longest = len(batch[0].encoded.ids)
        while self.next and (longest := max(longest, len(self.next[0].encoded.ids))) * (len(batch) + 1) <= tokens:
            batch.append(self.next.popleft())
        return batch
