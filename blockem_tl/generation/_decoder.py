"""The rows that run: they join in groups, get a token each at every step, and leave as they finish. The loop under `generation`."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from blockem_tl.data.chat import Encoded, pad
from blockem_tl.data.templates import end_tokens
from blockem_tl.generation._kv_cache import SlotCache
from blockem_tl.generation.steering import Condition
from blockem_tl.hooks import Hook, Step, step
from blockem_tl.models.load import Model
from blockem_tl.models.logits import logits_at


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One reply to make.

    index: in the whole stream of rows.  limit: most tokens of the reply.  seed: of its random numbers.
    """

    index: int
    condition_index: int
    prompt_index: int
    encoded: Encoded
    condition: Condition
    limit: int
    seed: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Most tokens that the row can have, prompt and reply."""
        return len(self.encoded.ids) + self.limit


@dataclass(frozen=True, kw_only=True, eq=False)
class Reply:
    """A finished row: its tokens without the end token, and whether it was cut at the limit."""

    row: Row
    ids: tuple[int, ...]
    truncated: bool


class Decoder:
    """Up to ``size`` rows that run together, each under its own condition.

    What is kept per row lies in arrays over slots; running rows are slots 0 to n - 1 (see `generation._kv_cache`). Whatever a step
    needs on the host is moved there once: the chosen tokens.

    Args:
        sites: every site that a row may be steered at.
        longest: most tokens of any row.  longest_reply: most tokens of any reply.
    """

    def __init__(self, model: Model, sites: Sequence[str], *, size: int, longest: int, longest_reply: int, temperature: float) -> None:
        self.model, self.size, self.temperature = model, size, temperature
        self.forward, self.stops = last_logits(model), np.array(end_tokens_of(model), np.int64)
        self.cache = SlotCache(size, longest)
        self.rows: list[Row] = []
        self.made, self.limit, self.length = (np.zeros(size, np.int64) for _ in range(3))
        self.replies = np.zeros((size, longest_reply), np.int64)
        self.uniform = np.zeros((size, longest_reply if temperature > 0 else 0))
        device = model.device
        self.token, self.position, self.index = (torch.zeros(size, dtype=torch.long, device=device) for _ in range(3))
        self.added = {site: torch.zeros(size, model.cfg.d_model, device=device) for site in sites}
        self.steered: set[str] = set()
        self.n_forwards = 0
        self.columns = torch.arange(self.cache.window.width, device=device)
        self.running = slice(0, 0)

    @property
    def n(self) -> int:
        """Number of running rows."""
        return len(self.rows)

    def hooks(self) -> list[Hook]:
        """One hook per site: each row gets its condition's vector (zero where its condition leaves the site alone)."""
        return [(site, self._hook(site)) for site in self.added]

    def attached(self, hooks: Sequence[Hook]) -> AbstractContextManager[Any]:
        """Inside the block these hooks and the decoder's own act on all that runs; strictly, see `attached`."""
        return self.model.hooks(fwd_hooks=[*hooks, *self.hooks()])

    def _hook(self, site: str) -> Callable[..., Tensor | None]:
        def fn(activation: Tensor, hook: HookPoint) -> Tensor | None:
            if site not in self.steered:
                return None  # by nobody who runs now
            return activation + self.added[site][self.running, None].to(activation.dtype)

        return fn

    def join(self, rows: Sequence[Row]) -> list[Reply]:
        """Prefill new rows in a batch of their own and let them run with the others; returns those that finish at once."""
        n, batch = self.n, pad([row.encoded for row in rows], self.model.pad_id, side="left", device=self.model.device)
        self.rows.extend(rows)
        self.running = slice(n, n + len(rows))
        self._seat(self.running, rows)
        self.cache.expect_newcomers(n, len(rows), batch.ids.shape[1], int(self.length[:n].max(initial=0)))
        return self._take(self._forward(batch.ids, batch.mask, batch.positions, is_prompt=True))

    def step(self) -> list[Reply]:
        """One more token for every row; returns the rows that finish."""
        n, longest = self.n, int(self.length[: self.n].max())
        self.cache.expect_step(n, longest)
        self.running = slice(0, n)
        positions = self.position[:n, None].clone()  # hooks may keep what they are told
        end, columns = self.cache.end, self.columns[: self.cache.window.columns]
        mask = (columns >= end - positions) & (columns <= end)
        logits = self._forward(self.token[:n, None], mask, positions, is_prompt=False)
        self.cache.stepped()
        self.length[:n] += 1
        return self._take(logits)

    def _seat(self, slots: slice, rows: Sequence[Row]) -> None:
        """Write down what the rows bring along."""
        self.length[slots] = [len(row.encoded.ids) for row in rows]
        self.limit[slots] = [row.limit for row in rows]
        self.made[slots] = 0
        self.index[slots] = torch.tensor([row.index for row in rows], device=self.model.device)
        self.position[slots] = torch.as_tensor(self.length[slots], device=self.model.device) - 1
        if self.temperature > 0:
            for slot, row in enumerate(rows, slots.start):
                self.uniform[slot, : row.limit] = np.random.default_rng(row.seed).random(row.limit)
        for added in self.added.values():
            added[slots] = 0
        for slot, row in enumerate(rows, slots.start):
            for steering in row.condition.steering:
                self.added[steering.site][slot] = steering.vector.to(self.model.device)
        self.steered = {s.site for row in self.rows for s in row.condition.steering}

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, *, is_prompt: bool) -> Float[Tensor, "batch d_vocab"]:
        real = mask if is_prompt else torch.ones_like(ids, dtype=torch.bool)
        rows, made = self.index[self.running].clone(), torch.tensor(self.made[self.running], device=ids.device)
        now = Step(mask=real, positions=positions, is_prompt=is_prompt, rows=rows, made=made, number=self.n_forwards)
        self.n_forwards += 1
        with step(now):
            return self.forward(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True)

    def _take(self, logits: Float[Tensor, "batch d_vocab"]) -> list[Reply]:
        """Choose a token for each of the rows that ran, write it down, and let the rows go that end with it."""
        if not torch.isfinite(logits.max(-1).values).all():  # NaN counts as the largest
            raise FloatingPointError("the model's logits are NaN or infinite: is the adapter broken, a dose or a hook's edit too large?")
        slots = np.arange(self.running.start, self.running.stop)
        token = self._choose(logits, slots)
        self.token[self.running] = token
        self.position[self.running] += 1
        values = token.cpu().numpy()
        self.replies[slots, self.made[slots]] = values
        self.made[slots] += 1
        ended = np.isin(values, self.stops)
        done = ended | (self.made[slots] >= self.limit[slots])
        if not done.any():
            return []
        finished = [
            Reply(row=self.rows[slot], ids=tuple(self.replies[slot, : self.made[slot] - end].tolist()), truncated=not end)
            for slot, end in zip(slots[done].tolist(), ended[done].tolist(), strict=True)
        ]
        self._leave(set(slots[done].tolist()))
        return finished

    def _leave(self, gone: set[int]) -> None:
        """Rows from the end take the slots of those that left."""
        n = self.n - len(gone)
        holes, movers = [slot for slot in sorted(gone) if slot < n], [slot for slot in range(n, self.n) if slot not in gone]
        if holes:
            to, origin = (torch.tensor(slots, device=self.model.device) for slots in (holes, movers))
            self.cache.refill(to, origin)
            for tensor in (self.token, self.position, self.index, *self.added.values()):
                tensor[to] = tensor[origin]
            for array in (self.made, self.limit, self.length, self.replies, self.uniform):
                array[holes] = array[movers]
            for hole, mover in zip(holes, movers, strict=True):  # last: if memory runs out above, `rows` is still complete
                self.rows[hole] = self.rows[mover]
        del self.rows[n:]

    def _choose(self, logits: Float[Tensor, "batch d_vocab"], slots: np.ndarray) -> Int[Tensor, " batch"]:
        """Greedy, or sampling by inverse CDF with the row's own number for this token, so that rows do not depend on their batch."""
        if self.temperature == 0:
            return logits.argmax(-1)
        cumulative = (logits.double() / self.temperature).softmax(-1).cumsum(-1)
        uniform = torch.as_tensor(self.uniform[slots, self.made[slots]], device=logits.device)[:, None]
        return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def last_logits(model: Model) -> Callable[..., Float[Tensor, "batch d_vocab"]]:
    """The model's forward, returning the last position's logits only."""
    last = torch.tensor([-1], device=model.device)
    return lambda **inputs: logits_at(model, last, **inputs)[:, 0].float()


def end_tokens_of(model: Model) -> list[int]:
    """Every token id that ends a reply; see `end_tokens`."""
    return end_tokens(model.tokenizer, getattr(model.original_model.generation_config, "eos_token_id", None))
