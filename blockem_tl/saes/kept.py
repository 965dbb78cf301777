"""`KeptActivations`: parts of a corpus's activations, computed once and read again from a temporary file; memory holds one part."""

import tempfile
from collections.abc import Callable, Hashable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class KeptActivations:
    """A temporary file of activations, gone with this object. Parts that no longer fit into ``most_bytes`` are computed every time."""

    def __init__(self, most_bytes: float) -> None:
        self._most, self._used = most_bytes, 0
        self._file = tempfile.TemporaryFile(prefix="blockem-activations-")  # noqa: SIM115 - it lives as long as this object
        self._places: dict[Hashable, tuple[int, torch.Size, torch.dtype]] = {}

    def get(self, part: Hashable, compute: Callable[[], Float[Tensor, "tokens d_model"]]) -> Float[Tensor, "tokens d_model"]:
        """The part's activations, in the dtype that they were computed in. On a CPU if they were kept."""
        if part in self._places:
            return self._read(*self._places[part])
        activations = compute()
        n_bytes = activations.numel() * activations.element_size()
        if n_bytes and self._used + n_bytes <= self._most:
            self._file.seek(self._used)
            self._file.write(self._bytes(activations))
            self._places[part] = (self._used, activations.shape, activations.dtype)
            self._used += n_bytes
        return activations

    @staticmethod
    def _bytes(activations: Tensor) -> Any:
        return activations.detach().cpu().contiguous().view(torch.uint8).numpy().data

    def _read(self, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        self._file.seek(start)
        return torch.frombuffer(bytearray(self._file.read(shape.numel() * dtype.itemsize)), dtype=dtype).reshape(shape)
