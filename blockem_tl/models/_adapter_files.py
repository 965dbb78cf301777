"""Adapters on disk, in peft's plain format: what this library writes any other tool loads, and the other way round."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blockem_tl.models._adapter_config import read_config
from blockem_tl.models._peft_bridge import WRAPPER
from blockem_tl.storage import files

FILES = ("adapter_config.json", "adapter_model.safetensors")


class AdapterFiles:
    """The part of `LiveAdapters` that saves, loads and replaces adapters."""

    source: str
    adapters: Any
    adapter_parameters: Callable[[str], list[nn.Parameter]]
    _remove: Callable[[str], None]
    adapter_config: Callable[[str | None], LoraConfig]
    active_adapter: str | None
    _use: Callable[[str], None]
    _inject: Callable[..., None]

    def save_adapter(self, folder: str | Path, name: str | None = None, *, overwrite: bool = False) -> Path:
        """Save an adapter (None: the active one) in peft's plain format, which other tools load. Whole or not at all.

        Raises:
            ValueError: no such adapter, or folder and name in the wrong order.
            FileExistsError: the folder exists and ``overwrite`` is False, or it holds something else than an adapter.
            FloatingPointError: an adapter with NaN or infinity in it.
        """
        name = self.active_adapter if name is None else name
        if name not in self.adapters and (str(folder) in self.adapters or _is_path(name)):
            raise ValueError(_swapped("save_adapter", folder, name))
        self.adapter_config(name)
        self.check_adapter_finite(cast(str, name))
        folder = Path(folder)
        others = sorted(path.name for path in folder.iterdir() if path.name not in (*FILES, "README.md")) if folder.is_dir() else []
        if overwrite and others:
            raise FileExistsError(f"{folder} holds {others[:3]} besides an adapter, which would be lost: choose another folder")
        with files.finished_folder(folder, replaces="adapter_config.json" if overwrite else None) as temporary:
            self.write_adapter(temporary, cast(str, name))
        return folder

    def check_adapter_finite(self, name: str) -> None:
        """Raise FloatingPointError for an adapter with NaN or infinity in it: nothing that it says would mean anything."""
        if not all(torch.isfinite(parameter).all() for parameter in self.adapter_parameters(name)):
            raise FloatingPointError(
                f"adapter {name!r} holds NaN or infinity, so it is not kept: lower the learning rate, or train it from a good checkpoint"
            )

    def write_adapter(self, folder: str | Path, name: str) -> None:
        """Write an adapter's two files in peft's plain format into a folder that is there (`save_adapter` is the safe way)."""
        state = get_peft_model_state_dict(cast(PeftModel, self.__dict__["_peft"]), adapter_name=name)
        plain = {key.replace(WRAPPER, ""): value.detach().cpu().contiguous() for key, value in state.items()}
        try:
            save_file(plain, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write the adapter to {folder}: {error}. Is the disk full? Make room, or write elsewhere") from error
        config = copy(self.adapter_config(name))  # a live PeftModel's own: whether it trains is not ours to change
        config.inference_mode = True
        config.save_pretrained(str(folder))

    def restore_adapter(self, folder: str | Path, name: str) -> None:
        """Give an adapter that the model holds the tensors saved in ``folder``. Raises ValueError where any is missing or left over."""
        peft = cast(PeftModel, self.__dict__["_peft"])
        held = get_peft_model_state_dict(peft, adapter_name=name)
        ours = {key.replace(WRAPPER, ""): key for key in held}
        saved = self._without_base_copies(folder, read_tensors(Path(folder)))
        if ours.keys() != saved.keys():
            missing, extra = sorted(ours.keys() - saved.keys()), sorted(saved.keys() - ours.keys())
            raise ValueError(f"{folder}: the adapter does not fit {self.source}: missing {missing[:3]}, left over {extra[:3]}")
        wide = [key for key in ours if not torch.isfinite(saved[key].to(held[ours[key]].dtype)).all()]
        if wide:
            raise ValueError(f"{folder}: {wide[0]} holds numbers too large for {held[ours[wide[0]]].dtype}: the adapter is broken")
        wrong = [key for key in ours if held[ours[key]].shape != saved[key].shape]
        if wrong:
            raise ValueError(
                f"{folder}: the adapter does not fit {self.source}: {wrong[0]} has the shape {tuple(saved[wrong[0]].shape)}, expected "
                f"{tuple(held[ours[wrong[0]]].shape)}: was it trained on another model, or is its rank another than its configuration says?"
            )
        set_peft_model_state_dict(peft, {ours[key]: value for key, value in saved.items()}, adapter_name=name)

    def _without_base_copies(self, folder: str | Path, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors but for copies of the base model's own weights, which peft saves where LoRA sits on the output layer."""
        own = {key.replace(WRAPPER, ""): tensor for key, tensor in self.__dict__["_peft"].state_dict().items()}
        copies = [key for key in saved if key.endswith(".base_layer.weight") and key in own]
        for key in copies:
            if saved[key].shape != own[key].shape or not torch.equal(saved[key].to(own[key]), own[key]):
                raise ValueError(
                    f"{folder}: {key} holds other weights than the base model's: merge the adapter into its model and load that"
                )
        return {key: tensor for key, tensor in saved.items() if key not in copies}

    @contextmanager
    def replacing_adapter(self, name: str, overwrite: bool = True) -> Iterator[None]:
        """Inside the block ``name`` is free for a new adapter; if the block fails, all adapters are as before it.

        Raises:
            ValueError: a name already held (without ``overwrite``), one that peft would confuse, or a call inside of `using`.
        """
        if name == "base" or "." in name or name in "lora_" or hasattr(nn.ModuleDict, name) or self.__dict__["_chosen"]:
            raise ValueError(
                f"adapter {name!r}: expected a name other than 'base', without dots, that is no part of 'lora_' and no name of a torch "
                f"method (peft would confuse them), outside of model.using(...); this model holds {self.adapters}"
            )
        if name in self.adapters and not overwrite:
            raise ValueError(f"adapter {name!r} is already held: pass overwrite=True to replace it, or choose another name")
        with tempfile.TemporaryDirectory() as folder:
            held, active = name in self.adapters, self.active_adapter
            trainable = {n: [p.requires_grad for p in self.adapter_parameters(n)] for n in self.adapters}
            if held:
                self.write_adapter(folder, name)
                self._remove(name)
            try:
                yield
            except BaseException:
                if name in self.adapters:
                    self._remove(name)
                if held:
                    self._load(Path(folder), name)
                self._restore_choice(active, trainable)
                raise

    def _restore_choice(self, active: str | None, trainable: dict[str, list[bool]]) -> None:
        self.__dict__["_plain_configs"] = {name: self.adapter_config(name) for name in trainable}  # in their old order
        if active is not None:
            self._use(active)
        for name, required in trainable.items():
            for parameter, flag in zip(self.adapter_parameters(name), required, strict=True):
                parameter.requires_grad_(flag)

    def _load(self, folder: Path, name: str) -> None:
        if not all((folder / file).is_file() for file in FILES):
            raise ValueError(f"{folder}: expected an adapter folder ({', '.join(FILES)}); {_found_instead(folder)}")
        config, tensors = read_config(folder), read_tensors(folder)  # before anything is touched
        largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
        if max([config.r, *(config.rank_pattern or {}).values()]) > largest:
            raise ValueError(
                f"{folder}: its configuration has larger ranks than its tensors have rows: one of the files is another adapter's"
            )
        config.inference_mode = False
        try:
            self._inject(name, config, seed=0)
        except Exception as error:  # peft raises whatever it trips over
            raise ValueError(f"{folder}: this adapter cannot be put into {self.source}: {error}") from error
        try:
            self.restore_adapter(folder, name)
        except BaseException:
            self._remove(name)  # it would be active with random weights
            raise
        for parameter in self.adapter_parameters(name):
            parameter.requires_grad_(False)


def _is_path(name: object) -> bool:
    return isinstance(name, Path) or (isinstance(name, str) and (os.sep in name or Path(name).is_dir()))


def _swapped(call: str, first: object, second: object) -> str:
    return f"{call}: the folder comes first, then the name: {call}({str(second)!r}, {str(first)!r}); got {str(first)!r} as the folder"


def check_order(folder: str | Path, name: object) -> None:
    """Raise ValueError if folder and name of `LiveAdapters.load_adapter` were given in the wrong order."""
    if _is_path(name) and not Path(folder).exists():
        raise ValueError(_swapped("load_adapter", folder, name))


def _found_instead(folder: Path) -> str:
    """What there is instead of an adapter, and what to do about it."""
    inside = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    if inside:
        return f"there is one in each of {inside}: name one"
    if (folder / "adapter_model.bin").is_file():
        return "it has adapter_model.bin, which is a pickle: load it in peft and save it again (save_pretrained writes safetensors)"
    if not folder.exists():
        return "there is no such folder; an adapter on the hub has to be downloaded first (hf download)"
    return "save one with save_adapter"


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the adapter in ``folder``. Raises ValueError for a file that is no safetensors, or numbers that are none."""
    path = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected tensors as safetensors writes them, got a broken file: {error}; copy it anew") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            what = f"of {tensor.dtype}" if not tensor.is_floating_point() else "NaN or infinity"
            raise ValueError(
                f"{path}: expected finite floating-point numbers in every tensor, got {what} in {name}: this adapter is broken"
            )
    return tensors
