"""Rows that wait, rows that run: one stream of KV-cached rows for many conditions and prompts.

Every row carries its own condition (a direction and a dose), finished rows leave the batch and waiting ones take their places, and
positions are those of the unpadded row: a batched reply equals the reply generated alone, token for token.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from blockem_tl.data.chat import Encoded
from blockem_tl.generation._decoder import Decoder, Reply, Row
from blockem_tl.generation._kv_cache import CHUNK
from blockem_tl.generation._request import check_prompt_indices, check_request, steered_sites
from blockem_tl.generation._shared_prefill import SHARED_TOKENS, SharedDecoder, prefill_tokens
from blockem_tl.generation.steering import Condition
from blockem_tl.hooks import Hook
from blockem_tl.models.activations import block_of
from blockem_tl.models.load import Model
from blockem_tl.models.memory import check_batch_size, halved, is_out_of_memory, rows_at_once
from blockem_tl.types import Generation, Prompt, check_hooks
from blockem_tl.views.progress import progress_bar

MOST_ROWS, MOST_ROWS_ON_CPU = 1024, 256
"""Rows that run at once at most, if nobody says how many: more of them gained nothing."""

REFILL_SHARE = 1 / 8
"""Of the places in a batch, how many have to be free before waiting rows join: a prefill costs about as much as a step or two."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A request, checked. decoder_type: what makes the decoder; another one runs the rows in another way (see `patching/`).

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
    prompt_indices: Sequence[Sequence[int]] | None = None
    adapter: str | Path | None = None
    decoder_type: Callable[..., Decoder] = Decoder
    prefill_order: Callable[[Row], Any] = lambda row: len(row.encoded.ids)

    @property
    def longest(self) -> int:
        return max(len(encoded.ids) + limit for encoded, limit in zip(self.encoded, self.limits, strict=True))

    def asked_by(self, condition: int) -> Sequence[int]:
        """Indices of the prompts that a condition asks."""
        return range(len(self.prompts)) if self.prompt_indices is None else self.prompt_indices[condition]

    @property
    def n_rows(self) -> int:
        return sum(len(self.asked_by(c)) for c in range(len(self.conditions)))

    def rows(self) -> Iterator[Row]:
        """Condition by condition, so that conditions finish one after the other; inside one, equal lengths together: less padding."""
        for c, condition in enumerate(self.conditions):
            for p in sorted(self.asked_by(c), key=lambda p: len(self.encoded[p].ids)):
                own = blake2b(f"{condition.name}\0{self.prompts[p].id}".encode(), digest_size=8).digest()
                yield Row(
                    index=c * len(self.prompts) + p,
                    condition_index=c,
                    prompt_index=p,
                    encoded=self.encoded[p],
                    condition=condition,
                    limit=self.limits[p],
                    seed=(self.seed, int.from_bytes(own, "big")),
                )

    def decoder(self, size: int) -> Decoder:
        """A decoder that runs ``size`` rows at once."""
        decoder_type, first = self.decoder_type, self.shared_below(size)
        if first > 0:
            asked = {p: self.encoded[p] for p in self.asked}
            decoder_type = partial(SharedDecoder, start_at_block=first, prompts=asked)
        return decoder_type(
            self.model, self.sites, size=size, longest=self.longest, longest_reply=max(self.limits), temperature=self.temperature
        )

    @property
    def asked(self) -> list[int]:
        """The prompts that any condition asks."""
        return sorted({p for c in range(len(self.conditions)) for p in self.asked_by(c)})

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
        prompt = self.prompts[reply.row.prompt_index]
        return Generation(prompt=prompt, condition=reply.row.condition.name, reply=text, reply_ids=reply.ids, truncated=reply.truncated)


def make_job(
    model: Model,
    prompts: Sequence[Prompt],
    conditions: Sequence[Condition],
    hooks: Iterable[Hook],
    max_new_tokens: int | Sequence[int],
    temperature: float,
    seed: int,
    prompt_indices: Sequence[Sequence[int]] | None = None,
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
        hooks=check_hooks(hooks),
        sites=steered_sites(model, conditions),
        limits=limits,
        temperature=temperature,
        seed=seed,
        prompt_indices=None if prompt_indices is None else check_prompt_indices(prompt_indices, len(conditions), len(prompts)),
        adapter=adapter,
    )


def fitting(job: Job) -> int:
    """Number of the job's rows that fit into the free memory at once, and still speed things up (docs/generation.md)."""
    most = MOST_ROWS_ON_CPU if job.model.device.type == "cpu" else MOST_ROWS
    return rows_at_once(job.model, job.longest + CHUNK, most=most)


def run_job(job: Job, batch_size: int | None, *, refill: bool = True, progress: bool = True) -> Iterator[tuple[int, list[Generation]]]:
    """Check ``batch_size``, then yield (index of the condition, its replies) as `generate_stream` does."""
    check_batch_size(batch_size)
    return _held(job, min(batch_size or fitting(job), job.n_rows), refill, progress)


def _held(job: Job, size: int, refill: bool, progress: bool) -> Iterator[tuple[int, list[Generation]]]:
    """The loop, with an adapter from a folder loaded once."""
    with job.model.holding(job.adapter) as name:
        yield from _finished_conditions(replace(job, adapter=name), size, refill, progress)


def _finished_conditions(job: Job, size: int, refill: bool, progress: bool) -> Iterator[tuple[int, list[Generation]]]:
    """The loop: run until conditions finish, yield them with the model as it was, go on; halve the batch where memory runs out."""
    waiting, decoder = _Waiting(job.rows(), job.prefill_order), job.decoder(size)
    open_conditions: dict[int, dict[int, Generation]] = {}
    with progress_bar(total=job.n_rows, desc="replies", show=progress) as bar:
        while waiting or decoder.n:
            ready: list[tuple[int, list[Generation]]] = []
            failed = None
            try:
                with torch.no_grad(), job.model.using(job.adapter), decoder.attached(job.hooks):
                    while not ready and (waiting or decoder.n):
                        for reply in _advance(decoder, waiting, refill):
                            c, p = reply.row.condition_index, reply.row.prompt_index
                            replies = open_conditions.setdefault(c, {})
                            replies[p] = job.generation(reply)
                            bar.update()
                            if len(replies) == len(job.asked_by(c)):
                                ready.append((c, [replies[p] for p in job.asked_by(c)]))
                                del open_conditions[c]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failed = str(error)
            if failed is not None:  # outside of the except block, where the error would still hold the tensors
                waiting.put_back(decoder.rows)
                decoder = None  # frees its cache before the next is made
                size = halved(size, job.longest, failed, option="batch_size", advice="shorten max_new_tokens or the prompts")
                decoder = job.decoder(size)
            yield from ready


def _advance(decoder: Decoder, waiting: "_Waiting", refill: bool) -> list[Reply]:
    """Let waiting rows join where enough places are free for that to be worth a prefill; otherwise one token for every row."""
    free = decoder.size - decoder.n
    if waiting and (decoder.n == 0 or waiting.next or (refill and free >= REFILL_SHARE * decoder.size)):
        return decoder.join(waiting.batch(free, prefill_tokens(decoder.model)))
    return decoder.step()


class _Waiting:
    """Rows that wait, in order; those that are put back come first. ``next``: those that join now, in the order of ``key``."""

    def __init__(self, rows: Iterator[Row], key: Callable[[Row], Any]) -> None:
        self.rows, self.key, self.returned, self.next = rows, key, deque[Row](), deque[Row]()

    def __bool__(self) -> bool:
        if not self.returned and not self.next:
            self.returned.extend(islice(self.rows, 1))
        return bool(self.returned or self.next)

    def put_back(self, rows: Iterable[Row]) -> None:
        self.returned.extendleft(sorted([*rows, *self.next], key=lambda row: row.index, reverse=True))
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
