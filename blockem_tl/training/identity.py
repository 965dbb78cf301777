"""The identity of a run: everything that its result depends on, field by field, so that another run's checkpoint is refused by name."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from sae_lens import SAE
from torch import Tensor

from blockem_tl.data.chat import Encoded
from blockem_tl.models.load import Model
from blockem_tl.storage import fingerprints
from blockem_tl.training.config import TrainingConfig
from blockem_tl.training.defence import Defence

_NO_MATTER = ("micro_batch_size", "gradient_checkpointing")  # how a step is computed, not what it computes
_NOTHING = "(nothing)"


def identity_of(model: Model, adapter: str, rows: Sequence[Encoded], config: TrainingConfig, defences: Sequence[Defence]) -> dict[str, str]:
    """Field -> value, as text. The adapter is described as it is now, at its start."""
    identity = {
        "model and starting adapter": model.fingerprint(adapter),
        "rows": _short_hash(repr([(row.ids, row.n_prompt) for row in rows]).encode()),
    }
    identity |= {f"config.{name}": str(value) for name, value in asdict(config).items() if name not in _NO_MATTER}
    for defence in defences:
        identity |= _described(defence.name, defence)
    return identity


def differences(kept: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The fields that differ, with both values."""
    return [
        f"{name}: {kept.get(name, _NOTHING)} there, {now.get(name, _NOTHING)} here"
        for name in {**kept, **now}
        if kept.get(name, _NOTHING) != now.get(name, _NOTHING)
    ]


def _described(name: str, value: Any) -> dict[str, str]:
    """Fields of dataclasses one by one, lists item by item; weights by their contents, and everything else as it prints."""
    if isinstance(value, SAE):
        return {name: fingerprints.of_sae(value)}
    if isinstance(value, Model):
        return {name: value.fingerprint(value.active_adapter)}
    if isinstance(value, Tensor):
        return {name: _short_hash(fingerprints.of_vector(value))}
    if is_dataclass(value):
        public = {field.name: getattr(value, field.name) for field in fields(value) if field.compare and not field.name.startswith("_")}
        return _joined(name, public)
    if isinstance(value, Mapping):
        return _joined(name, value)
    if isinstance(value, (list, tuple)) and not all(isinstance(item, (int, float, str)) for item in value):
        return _joined(name, dict(enumerate(value)))
    if value is None or isinstance(value, (bool, int, float, str, bytes, Path, list, tuple)):
        return {name: str(value)}
    parts = {key: part for key, part in getattr(value, "__dict__", {}).items() if not key.startswith("_")}
    return _joined(name, parts) or {name: type(value).__name__}


def _joined(name: str, parts: Mapping[Any, Any]) -> dict[str, str]:
    return {key: text for part, value in parts.items() for key, text in _described(f"{name}.{part}", value).items()}


def _short_hash(content: bytes) -> str:
    return fingerprints.of_bytes(content)[:16]
