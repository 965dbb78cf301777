"""Adapters on disk, in peft's plain format: what this library writes any other tool loads, and the other way round."""

from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from blockem_tl.models._peft_bridge import WRAPPER
from blockem_tl.storage import files

FILES = ("adapter_config.json", "adapter_model.safetensors")


class AdapterFiles:
    """The part of `LiveAdapters` that saves and loads adapters."""

    source: str
    adapters: Any
    adapter_parameters: Callable[[str], list[nn.Parameter]]
    remove_adapter: Callable[[str], None]
    adapter_config: Callable[[str | None], LoraConfig]
    _inject: Callable[..., None]

    def save_adapter(self, folder: str | Path, name: str | None = None, *, overwrite: bool = False) -> Path:
        """Save an adapter (None: the active one) in peft's plain format, which other tools load. Whole or not at all.

        Raises:
            ValueError: no such adapter.
            FileExistsError: the folder exists and ``overwrite`` is False, or it holds something else than an adapter.
        """
        if name is None and self.adapters:
            name = cast(str, self.__dict__["_peft"].active_adapter)
        self.adapter_config(name)
        folder = Path(folder)
        with files.finished_folder(folder, replaces="adapter_config.json" if overwrite else None) as temporary:
            self.write_adapter(temporary, cast(str, name))
        return folder

    def write_adapter(self, folder: str | Path, name: str) -> None:
        """Write an adapter's two files in peft's plain format into a folder that is there (`save_adapter` is the safe way)."""
        state = get_peft_model_state_dict(cast(PeftModel, self.__dict__["_peft"]), adapter_name=name)
        plain = {key.replace(WRAPPER, ""): value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(plain, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy(self.adapter_config(name))  # a live PeftModel's own: whether it trains is not ours to change
        config.inference_mode = True
        config.save_pretrained(str(folder))

    def restore_adapter(self, folder: str | Path, name: str) -> None:
        """Give an adapter that the model holds the tensors saved in ``folder``. Raises ValueError where any is missing or left over."""
        peft = cast(PeftModel, self.__dict__["_peft"])
        ours = {key.replace(WRAPPER, ""): key for key in get_peft_model_state_dict(peft, adapter_name=name)}
        saved = load_file(Path(folder) / "adapter_model.safetensors")
        if ours.keys() != saved.keys():
            missing, extra = sorted(ours.keys() - saved.keys()), sorted(saved.keys() - ours.keys())
            raise ValueError(f"{folder}: the adapter does not fit {self.source}: missing {missing[:3]}, left over {extra[:3]}")
        set_peft_model_state_dict(peft, {ours[key]: value for key, value in saved.items()}, adapter_name=name)

    def _load(self, folder: Path, name: str) -> None:
        if not all((folder / file).is_file() for file in FILES):
            raise ValueError(f"{folder}: expected an adapter folder ({', '.join(FILES)}); save one with save_adapter")
        config = LoraConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig):
            raise ValueError(f"{folder}: expected a LoRA adapter, got {type(config).__name__}")
        config.inference_mode = False
        self._inject(name, config, seed=0)
        try:
            self.restore_adapter(folder, name)
        except BaseException:
            self.remove_adapter(name)  # it would be active with random weights
            raise
        for parameter in self.adapter_parameters(name):
            parameter.requires_grad_(False)
