"""Latents before training: z of a reference model on the training rows, run live, or computed once and stored.

The reference activations depend on the input alone, so one pass over the data serves every weight, seed and epoch (a float32 per
token and latent). A store is found by its contents (weights, SAEs, latents, tokens, precision), checked when it is opened, and built
anew if anything about it is wrong.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float, Float32
from sae_lens import SAE
from torch import Tensor

from blockem_tl.data.chat import Batch, Encoded, pad
from blockem_tl.data.public import cache_folder
from blockem_tl.hooks import record
from blockem_tl.models.activations import stop_layer
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.models.sharding import check_whole
from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.saes.latents import encode_latents
from blockem_tl.storage import files, fingerprints, machine
from blockem_tl.views.progress import progress_bar

Target = tuple[LatentSet, SAE[Any]]
"""Latents to be read, and the SAE to read them with."""

_FORMAT = 1
_SPOT_CHECKED = 4  # rows
MOST_ROUNDING = 1e-4
"""Of the latents' variance: a hundredth of what `Blocking` allows them to move with ``weight="auto"``."""


@dataclass(frozen=True, kw_only=True)
class BaseLatents:
    """The latents that count as unmoved: of which model, and whether they are stored.

    Args:
        adapter_or_model: "base" (adapters off), an adapter that the model holds or that is saved in a folder (for runs that start from
            it), or another model with the same sites and tokens. A folder's adapter is loaded anew for every live reading: hold it.
        stored: compute once for the rows of the run and look up, instead of running the reference at every step.
        folder: to keep stored ones in for other runs; by default references/ in the user's cache.
    """

    adapter_or_model: str | Path | Model = BASE
    stored: bool = True
    folder: Path | None = None

    def _of(self, model: Model) -> tuple[Model, str | Path | None]:
        other = self.adapter_or_model
        return (other, None) if isinstance(other, Model) else (model, other)

    @contextmanager
    def reference_model(self, model: Model) -> Iterator[Model]:
        """Inside the block, the reference model, in eval mode and without gradient."""
        chosen, adapter = self._of(model)
        training = chosen.original_model.training
        chosen.original_model.eval()
        try:
            with torch.no_grad(), chosen.using(adapter):
                yield chosen
        finally:
            chosen.original_model.train(training)

    @contextmanager
    def held(self, model: Model) -> Iterator["BaseLatents"]:
        """Inside the block, the same with its adapter held by ``model``, so that a folder is loaded once."""
        chosen, adapter = self._of(model)
        with chosen.holding(adapter) as name:
            yield self if name is None else replace(self, adapter_or_model=name)

    def fingerprint(self, model: Model) -> str:
        """SHA-256 over the weights of the reference model."""
        chosen, adapter = self._of(model)
        with chosen.holding(adapter) as name:
            return chosen.fingerprint(chosen.active_adapter if name is None else name)


def read_latents(model: Model, targets: Sequence[Target], batch: Batch) -> Float[Tensor, "batch pos n_latents"]:
    """z of all targets side by side, from one forward of the model as it stands, stopped above the last site."""
    store = read_states(model, list(dict.fromkeys(latent_set.site for latent_set, _ in targets)), batch)
    with in_full_precision(model.device):
        return torch.cat([encode_latents(sae, store[k.site], k.latents).float() for k, sae in targets], dim=-1)


def read_states(model: Model, sites: Sequence[str], batch: Batch) -> dict[str, Float[Tensor, "batch pos d_model"]]:
    """The residual stream at the sites, from one forward of the model as it stands, stopped above the last one."""
    store: dict[str, Tensor] = {}
    model.run_with_hooks(
        batch.ids.to(model.device),
        fwd_hooks=[record(site, store) for site in sites],
        attention_mask=batch.mask.long().to(model.device),
        stop_at_layer=stop_layer(model, sites),
    )
    return store


def in_full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which SAEs are read in their own dtype also under autocast.

    bf16 moves a latent by 0.4 % of itself, and the penalty is a difference.
    """
    return torch.autocast(device.type, enabled=False)


class StoredLatents:
    """z of the reference on every token of known rows: float32 [tokens, n_latents] on disk, found by a row's token ids."""

    def __init__(self, values: Float32[np.ndarray, "tokens n_latents"], rows: Sequence[tuple[int, ...]]) -> None:
        self.values, self.rows = values, rows
        ends = np.cumsum([len(row) for row in rows])
        self._starts = {_key(row): int(end) - len(row) for row, end in zip(rows, ends, strict=True)}

    def row(self, ids: tuple[int, ...]) -> Float32[np.ndarray, "pos n_latents"]:
        """z on every token of one row. Raises KeyError for a row that was not stored."""
        start = self._starts[_key(ids)]
        return self.values[start : start + len(ids)]

    def look_up(self, batch: Batch) -> Float[Tensor, "batch pos n_latents"] | None:
        """z on the batch (0 at padding, on either side), or None if it holds a row that was not stored."""
        ids, mask = batch.ids.cpu().numpy(), batch.mask.cpu().numpy()
        latents = np.zeros((*ids.shape, self.values.shape[1]), dtype=np.float32)
        for i, (row, real) in enumerate(zip(ids, mask, strict=True)):
            tokens = row[real]
            start = self._starts.get(_key(tokens))
            if start is None:
                return None
            latents[i, real] = self.values[start : start + len(tokens)]
        return torch.from_numpy(latents).to(batch.ids.device)


def stored_latents(
    model: Model,
    targets: Sequence[Target],
    rows: Sequence[Encoded],
    reference: BaseLatents,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> StoredLatents:
    """The reference's latents on these rows: opened and checked, or computed now (batched, the forward stopped above the last site).

    A store that was changed, or no longer agrees with the model on a few rows, is built anew, with a warning. Raises if `is_sharded`.
    """
    check_whole(model, "stored references", 'pass reference="live"')
    unique = sorted({row.ids for row in rows}, key=lambda ids: (len(ids), ids))  # equal lengths together: hardly any padding
    parent = files.check_writable(reference.folder or cache_folder() / "references")
    with reference.held(model) as held:
        identity = _identity(model, targets, unique, held)
        key = fingerprints.of_value(identity)[:32]
        with FileLock(parent / f".{key}.lock"):  # processes side by side wait for the first one instead of computing the same
            folder = parent / key
            if folder.exists():
                values, wrong = _opened(folder)
                if values is not None:
                    store = StoredLatents(values, unique)
                    wrong = _spot_check(store, model, targets, held)
                    if not wrong:
                        return store
                warnings.warn(f"stored references in {folder} {wrong}: computing them again", stacklevel=2)
            values = _values(model, targets, unique, held, batch_size, progress)
            _build(folder, values, (sum(map(len, unique)), sum(len(latent_set) for latent_set, _ in targets)), identity)
            return StoredLatents(np.load(folder / "values.npy", mmap_mode="r"), unique)


def standard_deviations(
    model: Model,
    targets: Sequence[Target],
    rows: Sequence[Encoded],
    reference: BaseLatents,
    stored: StoredLatents | None,
    *,
    max_rows: int = 512,
) -> Float[Tensor, " n_latents"]:
    """Standard deviation of each latent on the reference, over the completion tokens of (at most) the first ``max_rows`` rows."""
    rows = rows[:max_rows]
    if stored is not None:
        read = (stored.row(row.ids) for row in rows)
    else:
        read = _values(model, targets, [row.ids for row in rows], reference, 32, progress=False)
    return torch.from_numpy(np.concatenate([latents[row.n_prompt :] for latents, row in zip(read, rows, strict=True)])).std(0, correction=0)


def stored_is_exact(
    stored: StoredLatents, model: Model, targets: Sequence[Target], rows: Sequence[Encoded], reference: BaseLatents
) -> bool:
    """Whether stored latents may stand for live ones, see `rounding`. Warns if not."""
    with reference.held(model) as held:
        share = rounding(stored, model, targets, rows, held)
    if share > MOST_ROUNDING:
        warnings.warn(
            f"stored references differ from live ones by {share:.2g} of the latents' variance, since rows round otherwise in other batches "
            "here, so the penalty would not be 0 before the first step: the reference runs live",
            stacklevel=4,
        )
    return share <= MOST_ROUNDING


def rounding(stored: StoredLatents, model: Model, targets: Sequence[Target], rows: Sequence[Encoded], reference: BaseLatents) -> float:
    """Mean square by which stored latents differ from those of a few rows run one by one, in units of the latents' variance there.

    It is 0 where a row's numbers do not depend on the batch that it is in, as on processors. Where they do, in bf16 most of all, a
    penalty on stored latents would not be 0 before the first step. No rows (a loop of one's own need not name them) do not differ.
    """
    if not rows:
        return 0.0
    spread, moved = [], []
    for row in rows[:: max(1, len(rows) // _SPOT_CHECKED)][:_SPOT_CHECKED]:
        (fresh,) = _values(model, targets, [row.ids], reference, 1, progress=False)
        kept = np.array(stored.row(row.ids))
        spread.append(kept[row.n_prompt :])
        moved.append(np.square(kept - fresh)[row.n_prompt :])
    variance = np.concatenate(spread).var(0).sum()
    return float(np.concatenate(moved).mean(0).sum() / variance) if variance > 0 else 0.0


def _identity(model: Model, targets: Sequence[Target], unique: Sequence[tuple[int, ...]], reference: BaseLatents) -> dict[str, Any]:
    """Everything that the values depend on."""
    device = model.device.type
    return {
        "format": _FORMAT,
        "weights": reference.fingerprint(model),
        "autocast": str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "",
        "targets": [[latent_set.site, latent_set.sae_fingerprint, list(latent_set.latents)] for latent_set, _ in targets],
        "rows": fingerprints.of_value([fingerprints.of_bytes(_key(ids)) for ids in unique]),
    }


def _values(
    model: Model,
    targets: Sequence[Target],
    rows: Sequence[tuple[int, ...]],
    reference: BaseLatents,
    batch_size: int,
    progress: bool,
) -> Iterator[Float32[np.ndarray, "pos n_latents"]]:
    """The reference's latents on each row."""
    for start in progress_bar(range(0, len(rows), batch_size), desc="reference latents", show=progress):
        part = rows[start : start + batch_size]
        batch = pad([Encoded(ids=ids, n_system=0, n_prompt=0) for ids in part], model.pad_id, side="right", device=model.device)
        with reference.reference_model(model) as chosen:
            latents = read_latents(chosen, targets, batch).cpu().numpy()
        for row, ids in zip(latents, part, strict=True):
            yield row[: len(ids)]


def _build(folder: Path, values: Iterator[Float32[np.ndarray, "pos n_latents"]], shape: tuple[int, int], identity: dict[str, Any]) -> None:
    """Write the values one after the other: through a memory map, a full disk would kill the process."""
    with files.finished_folder(folder, replaces="manifest.json") as temporary:
        try:
            with (temporary / "values.npy").open("wb") as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
                for latents in values:
                    file.write(np.ascontiguousarray(latents, dtype="<f4").tobytes())
                file.flush()
                os.fsync(file.fileno())
            made = {"environment": machine.described(), "sha256": fingerprints.of_file(temporary / "values.npy")}
            files.write_json(temporary / "manifest.json", {**identity, **made})
        except OSError as error:
            needed = 4 * shape[0] * shape[1] / 1e6
            raise OSError(
                f"cannot write {needed:.0f} MB of stored references to {folder}: {error.strerror}. Make room, or choose another folder"
            ) from error


def _opened(folder: Path) -> tuple[Float32[np.ndarray, "tokens n_latents"] | None, str]:
    """The values of a store, or None and the fault of its files."""
    try:
        whole = files.read_json(folder / "manifest.json")["sha256"] == fingerprints.of_file(folder / "values.npy")
        return (np.load(folder / "values.npy", mmap_mode="r"), "") if whole else (None, "were changed after they were written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"cannot be read ({error})"


def _spot_check(store: StoredLatents, model: Model, targets: Sequence[Target], reference: BaseLatents) -> str:
    """The fault of a store whose values a few rows, run now, do not confirm; empty if they do."""
    step = max(1, len(store.rows) // _SPOT_CHECKED)
    rows = store.rows[step - 1 :: step]
    half = any(p.dtype != torch.float32 for p in model.original_model.parameters()) or torch.is_autocast_enabled(model.device.type)
    for ids, fresh in zip(rows, _values(model, targets, rows, reference, len(rows), progress=False), strict=True):
        kept = store.row(ids)
        tolerance = (0.05 if half else 1e-3) * max(float(np.abs(kept).max()), 1e-3)  # other padding rounds otherwise
        if kept.shape != fresh.shape or not np.allclose(kept, fresh, rtol=0, atol=tolerance):
            return "no longer agree with the model"
    return ""


def _key(ids: Any) -> bytes:
    """A row's tokens as a dictionary's key."""
    return np.asarray(ids, dtype=np.int64).tobytes()
