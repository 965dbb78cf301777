"""The keys and values of the rows that run: rows join in groups, leave one by one, and a step moves nothing.

Every row ends at the same column, so that one step writes one column for all rows::

    slot 0   . . . a a a a a . .        . masked: padding on the left, room for the next tokens on the right
    slot 1   . b b b b b b b . .
    slot 2   . . . . . c c c . .        a newcomer is prefilled by itself and put here, ending where the others end

Attention reads all columns of the running rows, a contiguous tensor: on a CPU batched products are three to four times slower over a
strided window of it. So there are never many more columns than the longest row has tokens: every ``CHUNK`` steps all rows move.

A row that leaves is replaced by the last one, so the running rows are always slots 0 to n - 1. Sliding-window layers keep all columns too:
the distance between two columns of a row is the distance between its tokens, so the model's own mask is right.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

CHUNK = 16
"""Columns to the right of the rows' common end, when they have just moved."""


@dataclass
class _Window:
    """The columns that the forward writes and (decoding) reads, shared by all layers. A prefill reads nothing: newcomers have no past.

    width: most columns there can be.  columns: how many there are now.
    """

    size: int
    width: int
    columns: int = 0
    rows: slice = field(default_factory=lambda: slice(0, 0))
    written: slice = field(default_factory=lambda: slice(0, 0))
    reading: bool = False


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values, [size n_heads columns d_head], as transformers' models write and read them."""

    is_sliding = False

    def __init__(self, window: _Window) -> None:
        super().__init__()
        self.window = window
        self.memory: tuple[Tensor, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        window, states = self.window, (key_states, value_states)
        self.memory = tuple(s.new_zeros(window.size * s.shape[1] * window.width * s.shape[3]) for s in states)
        self.keys, self.values = (self._shaped(m, s.shape[1], s.shape[3]) for m, s in zip(self.memory, states, strict=True))
        self.is_initialized = True

    def _shaped(self, memory: Tensor, n_heads: int, d_head: int) -> Tensor:
        shape = (self.window.size, n_heads, self.window.columns, d_head)
        return memory[: shape[0] * shape[1] * shape[2] * shape[3]].view(shape)

    def move(self, n: int, longest: int, old_end: int, end: int) -> None:
        """In the first n rows, the ``longest`` columns before ``old_end`` move to before ``end``, in as many columns as there are now."""
        moved = []
        for memory, stored in zip(self.memory, self.tensors(), strict=True):
            live = stored[:n, :, old_end - longest : old_end].clone()  # a copy: the old and the new place overlap
            shaped = self._shaped(memory, stored.shape[1], stored.shape[3])
            shaped[:n] = 0
            shaped[:n, :, end - longest : end] = live
            moved.append(shaped)
        if moved:
            self.keys, self.values = moved

    def tensors(self) -> list[Tensor]:
        """Keys and values, once there are any."""
        return [tensor for tensor in (self.keys, self.values) if tensor is not None]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window, (keys, values) = self.window, self.tensors()
        keys[window.rows, :, window.written] = key_states
        values[window.rows, :, window.written] = value_states
        return (keys[window.rows], values[window.rows]) if window.reading else (key_states, value_states)

    def get_seq_length(self) -> int:
        return self.window.written.start if self.window.reading else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window.columns if self.window.reading else query_length, 0

    def get_max_length(self) -> int:
        return self.window.width


class SlotCache(Cache):
    """Room for ``size`` rows of up to ``longest`` tokens each. Memory is taken at the first forward, and none afterwards."""

    def __init__(self, size: int, longest: int) -> None:
        self._share(_Window(size, longest + CHUNK))

    def _share(self, window: _Window) -> None:
        super().__init__(layer_class_to_replicate=partial(_SlotLayer, window))  # pyright: ignore[reportArgumentType]
        self.window, self.twins, self.end = window, list[SlotCache](), 0

    def twin(self) -> "SlotCache":
        """Keys and values of a second model for the same rows: what is expected, moved or refilled here happens there too."""
        twin = SlotCache.__new__(SlotCache)
        twin._share(self.window)
        self.twins.append(twin)
        return twin

    def expect_newcomers(self, n: int, count: int, n_tokens: int, longest: int) -> None:
        """The next forward is the prefill of ``count`` rows, left-padded to ``n_tokens``, into the slots from n on.

        The n rows that run have at most ``longest`` tokens so far.
        """
        if self.end < n_tokens or n == 0:
            self._move(n, longest, n_tokens)
        for stored in self._stored():  # what is not written: masked, but NaN that an earlier row left there would pass any mask
            stored[n : n + count, :, : self.end - n_tokens] = 0
            stored[n : n + count, :, self.end :] = 0
        self.window.rows, self.window.written, self.window.reading = slice(n, n + count), slice(self.end - n_tokens, self.end), False

    def expect_step(self, n: int, longest: int) -> None:
        """The next forward is one token for each of the ``n`` rows, of which the longest has ``longest`` tokens so far."""
        if self.end == self.window.columns:
            self._move(n, longest, longest)
        self.window.rows, self.window.written, self.window.reading = slice(0, n), slice(self.end, self.end + 1), True

    def stepped(self) -> None:
        """The expected step was made."""
        self.end += 1

    def refill(self, holes: Tensor, movers: Tensor) -> None:
        """Rows ``movers`` take the slots ``holes`` of rows that left."""
        for stored in self._stored():
            stored[holes] = stored[movers]

    def _move(self, n: int, longest: int, end: int) -> None:
        """Let the ``n`` rows end at column ``end``, with room for a chunk of steps."""
        self.window.columns = min(end + CHUNK, self.window.width)
        for layer in self._layers():
            layer.move(n, longest, self.end, end)
        self.end = end

    def _layers(self) -> list[_SlotLayer]:
        return [layer for cache in (self, *self.twins) for layer in cache.layers if isinstance(layer, _SlotLayer)]

    def _stored(self) -> list[Tensor]:
        return [tensor for layer in self._layers() for tensor in layer.tensors()]
