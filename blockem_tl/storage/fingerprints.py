"""Identity by contents: SHA-256 of weights, SAEs, folders and settings. Names mean nothing here."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

_CONTENTS = (".safetensors", ".json", ".jinja", ".model", ".txt", ".bin")
_CHUNK = 1 << 20


_MOST_REMEMBERED = 32
_SUMMED = 1024
_SMALL = 1 << 16  # bytes of a tensor that is hashed sooner than summed
_SETTLED = 2.0  # seconds after which a file that is written again has another time
_hashes: dict[str, str] = {}


def of_value(value: Any) -> str:
    """Identity of settings, as JSON; what JSON does not know counts as it prints."""
    return of_bytes(json.dumps(value, sort_keys=True, default=str).encode())


def of_bytes(content: bytes) -> str:
    """SHA-256 of some bytes."""
    return hashlib.sha256(content).hexdigest()


def of_file(path: Path | str) -> str:
    """SHA-256 of a file's contents, read in pieces, and once as long as size, time and inode are the same."""

    def whole() -> str:
        digest = hashlib.sha256()
        with Path(path).open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    return _once("file", [Path(path)], whole)


def _once(kind: str, paths: Sequence[Path], whole: Callable[[], str]) -> str:
    """The hash of these files: as it was taken before if all are the same by size, time and inode, else ``whole()``.

    What was written within the last seconds is read again: written once more, it could have the same time.
    """
    found = [path.stat() for path in paths]
    settled = all(abs(time.time() - one.st_mtime) > _SETTLED for one in found)
    if not settled:
        return whole()
    about = [(str(p.resolve()), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in zip(paths, found, strict=True)]
    return _kept(of_value([kind, about]), whole)


def _kept(key: str, whole: Callable[[], str]) -> str:
    """The value remembered under the key, else ``whole()``, remembered: the last one used is the last one dropped."""
    _hashes[key] = _hashes.pop(key, None) or whole()
    while len(_hashes) > _MOST_REMEMBERED:
        del _hashes[next(iter(_hashes))]
    return _hashes[key]


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over tensors in the order of their names: names, shapes, dtypes and every bit of the values."""

    def whole() -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(_bits(_whole(tensor)))  # one at a time
        return digest.hexdigest()

    return remembered(tensors, "", whole)


def of_sae(sae: Any) -> str:
    """SHA-256 over an SAE's weights and over the settings that its latents' values depend on (kind, k, normalisation, ...).

    It is taken in float32 wherever the weights lie, but weights rounded to bf16 are other weights: load SAEs in their published dtype.
    """
    settings = {key: value for key, value in sae.cfg.to_dict().items() if key not in ("metadata", "device", "dtype")}
    about, weights = json.dumps(settings, sort_keys=True, default=str), sae.state_dict()

    def whole() -> str:
        digest = hashlib.sha256(about.encode())
        for name, tensor in sorted(weights.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(of_vector(tensor))
        return digest.hexdigest()

    return remembered(weights, about, whole)


def remembered(tensors: Mapping[str, Tensor], about: str, whole: Callable[[], str]) -> str:
    """The hash of these tensors: as it was taken before if they are the same, else ``whole()``.

    They are the same if they lie where they lay, were not written to as far as torch knows, and have the same sums of bits: an edit
    through ``.data``, which torch does not count, shows there. On a GPU only the sums come to the CPU.
    """
    key = hashlib.sha256(about.encode())
    for name, value in sorted(tensors.items()):
        tensor: Tensor = getattr(value, "to_local", lambda value=value: value)()  # of a sharded one the share in this process
        written = "inference" if tensor.is_inference() else tensor._version
        key.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{tensor.device}{tensor.data_ptr()}{written}".encode())
        small = tensor.device.type == "cpu" and tensor.numel() * tensor.element_size() <= _SMALL
        key.update(_bits(tensor) if small else _sums(tensor).cpu().numpy().data)
    return _kept(key.hexdigest(), whole)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor, or of a DTensor (whose class takes a second to import) all of it, gathered from all processes."""
    return getattr(tensor, "full_tensor", lambda: tensor)()


def _bits(tensor: Tensor) -> memoryview:
    """Every bit of a tensor's values."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _sums(tensor: Tensor) -> Tensor:
    """Sums of the bits, read as int64, along and across rows of 8 KB: values that change places show. Wrapping around is no harm."""
    plain = tensor.detach().contiguous().view(-1)
    if plain.storage_offset() * plain.element_size() % 8:
        plain = plain.clone()
    whole = len(plain) * plain.element_size() // 8 * 8 // plain.element_size()
    bits, rest = plain[:whole].view(torch.int64), plain[whole:].view(torch.uint8).long()
    even = len(bits) // _SUMMED * _SUMMED
    table, left = bits[:even].view(-1, _SUMMED), torch.cat([bits[even:], rest])
    return torch.cat([table.sum(1), table.sum(0), left])


def of_vector(tensor: Tensor) -> bytes:
    """A tensor's values as float32 bytes, whatever device and dtype they lie in: what a hash of a direction is taken over."""
    return tensor.detach().float().cpu().contiguous().numpy().tobytes()


def of_folder(source: str | Path) -> str:
    """Identity of a model or adapter on disk: the contents of its files, however the folder is called.

    Small files are read whole, of large ones (above 64 MB) the size and 64 MB spread over them. A hub id that is no folder is looked up
    in the hub's cache, where the path says the commit.

    Raises:
        ValueError: neither a folder nor a hub id that lies in the local cache.
    """
    folder = Path(source)
    if not folder.is_dir():
        config = try_to_load_from_cache(str(source), "config.json")
        if not isinstance(config, str):
            raise ValueError(f"cannot tell which weights {str(source)!r} are: expected a folder, or a hub id that lies in the local cache")
        return f"{source}@{Path(config).parent.name}"
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in _CONTENTS]

    def whole() -> str:
        digest = hashlib.sha256()
        for path in paths:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                for start in range(0, path.stat().st_size, max(_CHUNK, path.stat().st_size // 64)):
                    file.seek(start)
                    digest.update(file.read(_CHUNK))
        return digest.hexdigest()

    return _once("folder", paths, whole)
