"""`Meter`: how many bytes of tensors are alive, and how many were at most, inside a block, on any device or on none."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ATEN = torch.ops.aten
_BLOCK = 512
"""Bytes: allocators give whole blocks."""


class Meter(TorchDispatchMode):
    """Counts every tensor that an operation makes inside the block, until it is freed; views share what they view.

    On the "meta" device tensors have sizes and no data, so that a model of any size runs in seconds and a few megabytes. Code that looks
    at data meets what a healthy run would: every ``all`` holds, every ``any`` does not, every number is 1, and a mask takes the share
    ``masked`` of what it masks.

    Not counted: what a kernel allocates inside of itself, the libraries, and the CUDA context.
    """

    def __init__(self, *, masked: float = 1.0) -> None:
        super().__init__()
        self.masked, self.now, self.peak = masked, 0, 0
        self._sizes: dict[int, int] = {}
        self._never: set[int] = set()

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN._local_scalar_dense.default and args[0].is_meta:
            return _key(args[0]) not in self._never if args[0].dtype == torch.bool else 1
        if func is _ATEN.nonzero.default and args[0].is_meta:
            return torch.empty(max(1, round(self.masked * args[0].numel())), args[0].ndim, dtype=torch.long, device=args[0].device)
        if func is _ATEN.index.Tensor and args[0].is_meta:
            args = (args[0], [place for one in args[1] for place in self._places(one)], *args[2:])
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, Tensor):
                self._hold(one)
        if func in (_ATEN.any.default, _ATEN.any.dim) and found.is_meta:
            self._never.add(_key(found))
        return found

    def _places(self, index: Tensor | None) -> list[Tensor | None]:
        """For a mask, as many places as it is taken to have, in each of its dimensions."""
        if index is None or index.dtype != torch.bool:
            return [index]
        n = max(1, round(self.masked * index.numel()))
        return [torch.empty(n, dtype=torch.long, device=index.device) for _ in range(index.ndim)]

    def _hold(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._sizes:
            return
        self._sizes[key] = size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)
        self._never.discard(key)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
