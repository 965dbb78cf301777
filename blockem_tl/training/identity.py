"""What a run is: everything that its result depends on, field by field, so that a checkpoint of another run can be refused by name."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from sae_lens import SAE
from torch import Tensor

from blockem_tl.data.chat import Encoded
from blockem_tl.models.load import Model
from blockem_tl.storage.fingerprints import of_sae
from blockem_tl.training.config import TrainingConfig
from blockem_tl.training.defence import Defence

_NO_MATTER = ("micro_batch_size", "gradient_checkpointing")  # how a step is computed, not what it computes


def identity_of(model: Model, adapter: str, rows: Sequence[Encoded], config: TrainingConfig, defences: Sequence[Defence]) -> dict[str, str]:
    """Field -> value, as text. The adapter is described as it is now, at its start."""
    found = {
        "model and starting adapter": model.fingerprint(adapter),
        "rows": _digest(repr([(row.ids, row.n_prompt) for row in rows]).encode()),
    }
    found |= {f"config.{name}": str(value) for name, value in asdict(config).items() if name not in _NO_MATTER}
    for defence in defences:
        found |= _described(defence.name, defence)
    return found


def differences(kept: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The fields that differ, with both values."""
    missing = "(nothing)"
    return [
        f"{name}: {kept.get(name, missing)} there, {now.get(name, missing)} here"
        for name in {**kept, **now}
        if kept.get(name, missing) != now.get(name, missing)
    ]


def _described(name: str, value: Any) -> dict[str, str]:
    """Fields of dataclasses one by one, lists item by item; weights by their contents, and everything else as it prints."""
    if isinstance(value, SAE):
        return {name: of_sae(value)}
    if isinstance(value, Model):
        return {name: value.fingerprint(value.active_adapter)}
    if isinstance(value, Tensor):
        return {name: _digest(value.detach().float().cpu().contiguous().numpy().tobytes())}
    if is_dataclass(value):
        public = {field.name: getattr(value, field.name) for field in fields(value) if field.compare and not field.name.startswith("_")}
        return _joined(name, public)
    if isinstance(value, Mapping):
        return _joined(name, value)
    if isinstance(value, (list, tuple)) and not all(isinstance(item, (int, float, str)) for item in value):
        return _joined(name, dict(enumerate(value)))
    if value is None or isinstance(value, (bool, int, float, str, bytes, Path, list, tuple)):
        return {name: str(value)}
    return _joined(name, {key: part for key, part in getattr(value, "__dict__", {}).items() if not key.startswith("_")}) or {
        name: type(value).__name__
    }


def _joined(name: str, parts: Mapping[Any, Any]) -> dict[str, str]:
    return {key: text for part, value in parts.items() for key, text in _described(f"{name}.{part}", value).items()}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
