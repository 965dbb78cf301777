"""What the latents were before: z of a reference model on training rows, run live, or computed once and stored beside the tokens.

The reference activations depend on the input alone, so one pass over the data serves every weight, seed and epoch (a float32 per
token and latent). A store is found by its contents (weights, SAEs, latents, tokens, precision), checked when it is opened, and built
anew where anything about it is wrong.
"""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float, Float32
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from blockem_tl.data.chat import Batch, Encoded, pad
from blockem_tl.data.public import cache_folder
from blockem_tl.hooks import record
from blockem_tl.models.activations import stop_layer
from blockem_tl.models.load import Model
from blockem_tl.saes.latents import encode_latents
from blockem_tl.storage import files
from blockem_tl.storage.fingerprints import of_sae

_FORMAT = 1
_SPOT_CHECKED = 4  # rows


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Chosen latents of one SAE at one site."""

    site: str
    sae: SAE[Any]
    latents: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Whose latents count as unmoved.

    Args:
        of: None for base (adapters off), the name of an adapter that the model holds (for runs that start from it), or another model
            with the same sites and tokens.
        stored: compute once for the rows of the run and look up, instead of running the reference at every step.
        folder: where stored ones are kept for other runs; by default references/ in the user's cache.
    """

    of: str | Model | None = None
    stored: bool = True
    folder: Path | None = None

    @contextmanager
    def speaking(self, model: Model) -> Iterator[Model]:
        """The reference model, in eval mode, without gradient."""
        chosen = self.of if isinstance(self.of, Model) else model
        wearing: AbstractContextManager[Any] = model.using(self.of) if isinstance(self.of, str) else nullcontext()
        training = chosen.original_model.training
        chosen.original_model.eval()
        try:
            with torch.no_grad(), model.using("base") if self.of is None else wearing:
                yield chosen
        finally:
            chosen.original_model.train(training)

    def fingerprint(self, model: Model) -> str:
        """SHA-256 over the weights of the reference model."""
        if isinstance(self.of, Model):
            return self.of.fingerprint(self.of.active_adapter)
        return model.fingerprint(self.of)


def read_latents(model: Model, readings: Sequence[Reading], batch: Batch) -> Float[Tensor, "batch pos n_latents"]:
    """z of all readings side by side, from one forward of the model as it stands, stopped above the last site."""
    store: dict[str, Tensor] = {}
    sites = list(dict.fromkeys(reading.site for reading in readings))
    model.run_with_hooks(
        batch.ids.to(model.device),
        fwd_hooks=[record(site, store) for site in sites],
        attention_mask=batch.mask.long().to(model.device),
        stop_at_layer=stop_layer(model, sites),
    )
    with in_full_precision(model.device):
        return torch.cat([encode_latents(reading.sae, store[reading.site], reading.latents).float() for reading in readings], dim=-1)


def in_full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """SAEs are read in their own dtype also under autocast: bf16 moves a latent by 0.4 % of itself, and the penalty is a difference."""
    return torch.autocast(device.type, enabled=False)


class StoredLatents:
    """z of the reference on every token of known rows: float32 [tokens, n_latents] on disk, found by a row's token ids."""

    def __init__(self, values: Float32[np.ndarray, "tokens n_latents"], rows: Sequence[tuple[int, ...]]) -> None:
        self.values, self.rows = values, rows
        ends = np.cumsum([len(row) for row in rows])
        self._starts = {_digest(row): int(end) - len(row) for row, end in zip(rows, ends, strict=True)}

    def row(self, ids: tuple[int, ...]) -> Float32[np.ndarray, "pos n_latents"]:
        """z on every token of one row. Raises KeyError for a row that was not stored."""
        start = self._starts[_digest(ids)]
        return self.values[start : start + len(ids)]

    def look_up(self, batch: Batch) -> Float[Tensor, "batch pos n_latents"] | None:
        """z on the batch (0 at padding, on either side), or None where it holds a row that was not stored."""
        ids, mask = batch.ids.cpu().numpy(), batch.mask.cpu().numpy()
        found = np.zeros((*ids.shape, self.values.shape[1]), dtype=np.float32)
        for i, (row, real) in enumerate(zip(ids, mask, strict=True)):
            tokens = row[real]
            start = self._starts.get(_digest(tokens))
            if start is None:
                return None
            found[i, real] = self.values[start : start + len(tokens)]
        return torch.from_numpy(found).to(batch.ids.device)


def stored_latents(
    model: Model,
    readings: Sequence[Reading],
    rows: Sequence[Encoded],
    reference: Reference,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> StoredLatents:
    """The stored reference for these rows, opened and checked, or computed now (batched, the forward stopped above the last site).

    A store whose file was changed, or that no longer agrees with the model on a few rows, is built anew, with a warning.
    """
    unique = sorted({row.ids for row in rows}, key=lambda ids: (len(ids), ids))  # equal lengths together: hardly any padding
    identity = _identity(model, readings, unique, reference)
    key = hashlib.sha256(repr(sorted(identity.items())).encode()).hexdigest()[:32]
    parent = files.check_writable(reference.folder or cache_folder() / "references")
    with FileLock(parent / f".{key}.lock"):  # processes side by side wait for the first one instead of computing the same
        folder = parent / key
        if folder.exists():
            values, wrong = _opened(folder)
            if values is not None:
                store = StoredLatents(values, unique)
                wrong = _spot_check(store, model, readings, reference)
                if not wrong:
                    return store
            warnings.warn(f"stored references in {folder} {wrong}: computing them again", stacklevel=2)
        _build(folder, model, readings, unique, reference, identity, batch_size, progress)
        return StoredLatents(np.load(folder / "values.npy", mmap_mode="r"), unique)


def spread(
    model: Model,
    readings: Sequence[Reading],
    rows: Sequence[Encoded],
    reference: Reference,
    stored: StoredLatents | None,
    *,
    most: int = 512,
) -> Float[Tensor, " n_latents"]:
    """Standard deviation of each latent on the reference, over the completion tokens of (at most) the first ``most`` rows."""
    if stored is not None:
        kept = [stored.row(row.ids)[row.n_prompt :] for row in rows[:most]]
    else:
        ids = [row.ids for row in rows[:most]]
        read = (part for start in range(0, len(ids), 32) for part in _read_rows(model, readings, ids[start : start + 32], reference))
        kept = [part[row.n_prompt :] for part, row in zip(read, rows, strict=False)]
    return torch.from_numpy(np.concatenate(kept)).std(0, correction=0)


def _identity(model: Model, readings: Sequence[Reading], unique: Sequence[tuple[int, ...]], reference: Reference) -> dict[str, Any]:
    """Everything that the values depend on."""
    device = model.device.type
    tokens = hashlib.sha256()
    for ids in unique:
        tokens.update(_digest(ids))
    return {
        "format": _FORMAT,
        "weights": reference.fingerprint(model),
        "autocast": str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "",
        "readings": [[reading.site, of_sae(reading.sae), list(reading.latents)] for reading in readings],
        "rows": tokens.hexdigest(),
    }


def _build(
    folder: Path,
    model: Model,
    readings: Sequence[Reading],
    unique: Sequence[tuple[int, ...]],
    reference: Reference,
    identity: dict[str, Any],
    batch_size: int,
    progress: bool,
) -> None:
    shape = (sum(map(len, unique)), sum(len(reading.latents) for reading in readings))
    with files.finished_folder(folder, replaces="manifest.json") as temporary:
        values = np.lib.format.open_memmap(temporary / "values.npy", mode="w+", dtype=np.float32, shape=shape)
        done = 0
        for start in tqdm(range(0, len(unique), batch_size), desc="reference latents", disable=not progress):
            for latents in _read_rows(model, readings, unique[start : start + batch_size], reference):
                values[done : done + len(latents)] = latents
                done += len(latents)
        values.flush()
        files.write_json(temporary / "manifest.json", {**identity, "sha256": _file_digest(temporary / "values.npy")})


def _read_rows(
    model: Model, readings: Sequence[Reading], rows: Sequence[tuple[int, ...]], reference: Reference
) -> Iterator[Float32[np.ndarray, "pos n_latents"]]:
    encoded = [Encoded(ids=ids, n_system=0, n_prompt=0) for ids in rows]
    batch = pad(encoded, model.pad_id, side="right", device=model.device)
    with reference.speaking(model) as speaker:
        latents = read_latents(speaker, readings, batch).cpu().numpy()
    for row, ids in zip(latents, rows, strict=True):
        yield row[: len(ids)]


def _opened(folder: Path) -> tuple[Float32[np.ndarray, "tokens n_latents"] | None, str]:
    """The values of a store, or None and what is wrong with its files."""
    try:
        whole = files.read_json(folder / "manifest.json")["sha256"] == _file_digest(folder / "values.npy")
        return (np.load(folder / "values.npy", mmap_mode="r"), "") if whole else (None, "were changed after they were written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"cannot be read ({error})"


def _spot_check(store: StoredLatents, model: Model, readings: Sequence[Reading], reference: Reference) -> str:
    """Compare a few rows with the model itself; empty where they agree, else what is wrong."""
    step = max(1, len(store.rows) // _SPOT_CHECKED)
    rows = store.rows[step - 1 :: step]
    half = any(p.dtype != torch.float32 for p in model.original_model.parameters()) or torch.is_autocast_enabled(model.device.type)
    for ids, fresh in zip(rows, _read_rows(model, readings, rows, reference), strict=True):
        kept = store.row(ids)
        tolerance = (0.05 if half else 1e-3) * max(float(np.abs(kept).max()), 1e-3)  # other padding rounds otherwise
        if kept.shape != fresh.shape or not np.allclose(kept, fresh, rtol=0, atol=tolerance):
            return "no longer agree with the model"
    return ""


def _digest(ids: Any) -> bytes:
    return hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=16).digest()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
