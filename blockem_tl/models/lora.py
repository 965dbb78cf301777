"""Live LoRA adapters in a bridged model: injected into its modules, switched off without a copy, saved so that any other tool loads them.

peft sees the full bridged paths of the modules; everything that is saved or told to a user has the plain ones.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from blockem_tl.storage import files

LLAMA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_WRAPPER = "._original_component"  # what the bridge puts into every module path, and no other tool knows


class LiveAdapters:
    """The part of `Model` that holds adapters. It lives in a bridge, whose attributes it uses.

    source: where the base weights came from.
    """

    source: str
    original_model: nn.Module
    cfg: Any

    def _hold_none(self) -> None:
        self.__dict__["_peft"] = None  # through __dict__: as a registered submodule it would hold the model twice
        self.__dict__["_plain_configs"] = {}
        self.__dict__["_base_depth"] = 0

    def _adopt(self, peft: PeftModel, trained: Sequence[nn.Parameter]) -> None:
        """Take the adapters of a live PeftModel as our own; its trainable tensors stay trainable."""
        for name, config in peft.peft_config.items():
            if not isinstance(config, LoraConfig):
                raise ValueError(f"adapter {name!r}: expected LoRA, got {type(config).__name__}")
            self._check_plain(name, config)
            self.__dict__["_plain_configs"][name] = config
        self.__dict__["_peft"] = peft
        for parameter in trained:
            parameter.requires_grad_(True)
        self._check_reached(cast(str, peft.active_adapter))

    @property
    def hf(self) -> nn.Module:
        """The transformers model, or the PeftModel around it once there is an adapter. Calling it fires the hooks."""
        return self.__dict__["_peft"] or self.original_model

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters held, in order of arrival."""
        return list(self.__dict__["_plain_configs"])

    @property
    def active_adapter(self) -> str | None:
        """The adapter that acts now, or None where there is none or inside ``base()``."""
        peft = self.__dict__["_peft"]
        return None if peft is None or self.__dict__["_base_depth"] else cast(str, peft.active_adapter)

    def add_adapter(
        self,
        name: str = "default",
        *,
        rank: int = 16,
        alpha: int = 32,
        target_modules: Sequence[str] = LLAMA_PROJECTIONS,
        up_to_block: int | None = None,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Add a fresh LoRA adapter (B = 0, so nothing changes yet), trainable and active.

        Args:
            up_to_block: last block that gets LoRA ("freeze downstream" of a site is the site's own block); None for all blocks.
            seed: of LoRA's A matrices.

        Raises:
            ValueError: a name already held, a block out of range, targets that match nothing, or (RuntimeError) modules through which
                no gradient reaches the adapter.
        """
        if up_to_block is not None and not 0 <= up_to_block < self.cfg.n_layers:
            raise ValueError(f"up_to_block: expected 0..{self.cfg.n_layers - 1}, got {up_to_block}")
        layers = None if up_to_block is None else list(range(up_to_block + 1))
        self._inject(
            name,
            LoraConfig(
                r=rank,
                lora_alpha=alpha,
                lora_dropout=dropout,
                target_modules=list(target_modules),
                layers_to_transform=layers,
                task_type="CAUSAL_LM",
                base_model_name_or_path=self.source,
            ),
            seed,
        )

    def load_adapter(self, folder: str | Path, name: str = "default") -> None:
        """Load a LoRA adapter in peft's plain format, from this library or any other tool; it becomes active, not trainable.

        Raises:
            ValueError: no adapter in the folder, not LoRA, targets absent in this model, or tensors missing or left over.
        """
        folder = Path(folder)
        if not (folder / "adapter_model.safetensors").is_file() or not (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{folder}: expected an adapter folder (adapter_config.json, adapter_model.safetensors); save one with save_adapter"
            )
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

    def restore_adapter(self, folder: str | Path, name: str) -> None:
        """Give an adapter that the model holds the tensors saved in ``folder``. Raises ValueError where any is missing or left over."""
        peft = cast(PeftModel, self.__dict__["_peft"])
        ours = {key.replace(_WRAPPER, ""): key for key in get_peft_model_state_dict(peft, adapter_name=name)}
        saved = load_file(Path(folder) / "adapter_model.safetensors")
        if ours.keys() != saved.keys():
            missing, extra = sorted(ours.keys() - saved.keys()), sorted(saved.keys() - ours.keys())
            raise ValueError(f"{folder}: the adapter does not fit {self.source}: missing {missing[:3]}, left over {extra[:3]}")
        set_peft_model_state_dict(peft, {ours[key]: value for key, value in saved.items()}, adapter_name=name)

    def save_adapter(self, folder: str | Path, name: str | None = None, *, overwrite: bool = False) -> Path:
        """Save an adapter in peft's plain format, so that plain transformers + peft and vLLM load it. Whole or not at all.

        Raises:
            ValueError: no such adapter.
            FileExistsError: the folder exists and ``overwrite`` is False, or it holds something else than an adapter.
        """
        if name is None and self.adapters:
            name = cast(str, self.__dict__["_peft"].active_adapter)
        self._plain_config(name)
        folder = Path(folder)
        with files.finished_folder(folder, replaces="adapter_config.json" if overwrite else None) as temporary:
            self.write_adapter(temporary, cast(str, name))
        return folder

    def write_adapter(self, folder: str | Path, name: str) -> None:
        """Write an adapter's two files in peft's plain format into a folder that is there (`save_adapter` is the safe way)."""
        state = get_peft_model_state_dict(cast(PeftModel, self.__dict__["_peft"]), adapter_name=name)
        plain = {key.replace(_WRAPPER, ""): value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(plain, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy(self._plain_config(name))  # a live PeftModel's own: whether it trains is not ours to change
        config.inference_mode = True
        config.save_pretrained(str(folder))

    def use_adapter(self, name: str) -> None:
        """Make ``name`` the adapter that acts (and the only trainable one). Raises ValueError for an unknown name."""
        self._plain_config(name)
        cast(PeftModel, self.__dict__["_peft"]).set_adapter(name)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter. Raises ValueError for an unknown name."""
        self._plain_config(name)
        peft = cast(PeftModel, self.__dict__["_peft"])
        del self.__dict__["_plain_configs"][name]
        if self.adapters:
            if peft.active_adapter == name:
                peft.set_adapter(self.adapters[-1])
            peft.delete_adapter(name)
        else:
            self._take_out_lora()

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        """The LoRA tensors of one adapter."""
        ends = tuple(f".lora_{matrix}.{name}.weight" for matrix in "AB")
        return [parameter for key, parameter in self.hf.named_parameters() if key.endswith(ends)]

    @contextmanager
    def base(self) -> Iterator["LiveAdapters"]:
        """Inside the block the model is the base model: the same weights with every adapter off. Blocks nest."""
        # peft's own disable_adapter re-enables on leaving an inner block, turns requires_grad off and on and costs milliseconds.
        state = self.__dict__
        layers = [m for m in self.original_model.modules() if isinstance(m, BaseTunerLayer)] if state["_base_depth"] == 0 else []
        state["_base_depth"] += 1
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield self
        finally:
            state["_base_depth"] -= 1
            for layer in layers:
                layer._disable_adapters = False

    @contextmanager
    def using(self, name: str) -> Iterator["LiveAdapters"]:
        """Inside the block another adapter that the model holds acts; nothing becomes trainable. Raises ValueError for an unknown name."""
        self._plain_config(name)
        layers = [m for m in self.original_model.modules() if isinstance(m, BaseTunerLayer)]
        before = [layer._active_adapter for layer in layers]
        for layer in layers:
            layer._active_adapter = [name]
        try:
            yield self
        finally:
            for layer, active in zip(layers, before, strict=True):
                layer._active_adapter = active

    def fingerprint(self, adapter: str | None = None) -> str:
        """SHA-256 over the base model's weights, and over an adapter's if one is named; whatever LoRA layers there are besides."""
        digest = hashlib.sha256()
        plain = {
            name.replace(_WRAPPER, "").replace(".base_layer", ""): parameter
            for name, parameter in self.original_model.named_parameters()
            if ".lora_" not in name
        }
        chosen = {f"lora.{i}": parameter for i, parameter in enumerate(self.adapter_parameters(adapter))} if adapter else {}
        for name, parameter in sorted({**plain, **chosen}.items()):
            digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _plain_config(self, name: str | None) -> LoraConfig:
        if name not in self.__dict__["_plain_configs"]:
            raise ValueError(f"no adapter {name!r}: this model holds {self.adapters or 'none'}; add_adapter or load_adapter first")
        return self.__dict__["_plain_configs"][name]

    def _inject(self, name: str, plain: LoraConfig, seed: int) -> None:
        """Put LoRA layers into the live, bridged modules: peft sees the full bridged paths, everything saved the plain ones."""
        if name in self.adapters or "." in name or name in "lora_" or hasattr(nn.ModuleDict, name) or self.__dict__["_base_depth"]:
            raise ValueError(
                f"adapter {name!r}: expected a new name without dots that is no part of 'lora_' and no name of a torch method (peft would "
                f"confuse them), outside of base(); this model holds {self.adapters}"
            )
        self._check_plain(name, plain)
        targets = self._bridged_paths(plain)
        config = LoraConfig(**{**plain.to_dict(), "target_modules": targets, "layers_to_transform": None, "layers_pattern": None})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft = self.__dict__["_peft"]
            if peft is None:
                self.__dict__["_peft"] = get_peft_model(cast(PreTrainedModel, self.original_model), config, adapter_name=name)
            else:
                peft.add_adapter(name, config)
        self.hf.train(self.original_model.training)  # fresh layers come in training mode, where an adapter's dropout acts
        self.__dict__["_plain_configs"][name] = plain
        try:
            self.use_adapter(name)
            self._check_reached(name)
        except BaseException:
            self.remove_adapter(name)
            raise

    def _check_plain(self, name: str, config: LoraConfig) -> None:
        if config.rank_pattern or config.alpha_pattern or isinstance(config.target_modules, str):
            raise ValueError(
                f"adapter {name!r}: expected a list of target_modules without rank_pattern and alpha_pattern, which match module paths "
                "that a bridge spells differently: merge the adapter into its model, or retrain it with one rank"
            )

    def _take_out_lora(self) -> None:
        """Put the plain linear layers back. (peft's `unload` would tear out whole bridge modules, which pass its attribute test.)"""
        for module in list(self.original_model.modules()):
            for child_name, child in module.named_children():
                if isinstance(child, BaseTunerLayer):
                    setattr(module, child_name, child.get_base_layer())
        del cast(Any, self.original_model).peft_config
        self.__dict__["_peft"] = None

    def _bridged_paths(self, config: LoraConfig) -> list[str]:
        """Full bridged module paths that a plain peft config targets.

        Raises:
            ValueError: it targets nothing, or modules that the bridge has renamed (as it does to GPT-2's attention).
        """
        plain = _targeted(config, _linear_paths(_skeleton(self.original_model)))
        bridged = {path.replace(_WRAPPER, ""): path for path in _linear_paths(self.original_model)}
        if not plain:
            kinds = sorted({path.rsplit(".", 1)[-1] for path in bridged})
            raise ValueError(f"LoRA targets {config.target_modules} match no module: this model's linear modules are called {kinds}")
        renamed = [path for path in plain if path not in bridged]
        if renamed:
            raise ValueError(
                f"TransformerLens's bridge renames {len(renamed)} of the targeted modules, e.g. {renamed[0]}, so an adapter on "
                "them could not be saved for other tools: choose narrower target_modules, e.g. mlp.c_proj instead of c_proj"
            )
        return [bridged[path] for path in plain]

    def _check_reached(self, name: str) -> None:
        """Raise RuntimeError unless a gradient reaches every LoRA tensor: some bridged modules bypass the layer that peft wrapped."""
        parameters = self.adapter_parameters(name)
        tokens = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        with torch.enable_grad():
            total = cast(Any, self.hf)(input_ids=tokens, use_cache=False).logits.float().sum()
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        missed = sum(gradient is None for gradient in gradients)
        if missed:
            raise RuntimeError(
                f"{missed} of {len(gradients)} LoRA tensors get no gradient: the bridge bypasses those modules; choose other target_modules"
            )

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.original_model.parameters()).device


def _skeleton(hf: nn.Module) -> nn.Module:
    """The plain architecture without weights: what other tools will load an adapter into."""
    with torch.device("meta"):
        return type(hf)(cast(Any, hf).config)


def _linear_paths(hf: nn.Module) -> list[str]:
    """Paths of the modules that LoRA can wrap (or wraps already)."""
    return [
        path
        for path, module in hf.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, BaseTunerLayer)) and ".base_layer" not in path and "lora_" not in path
    ]


def _targeted(config: LoraConfig, paths: list[str]) -> list[str]:
    """The plain paths that a config's target_modules and layers_to_transform select, by peft's rule (the name or its ending)."""
    wanted = {config.target_modules} if isinstance(config.target_modules, str) else set(config.target_modules or ())
    layers = config.layers_to_transform
    blocks = {layers} if isinstance(layers, int) else set(layers) if layers is not None else None
    return [
        path
        for path in paths
        if any(path == target or path.endswith(f".{target}") for target in wanted) and (blocks is None or _block_index(path) in blocks)
    ]


def _block_index(path: str) -> int | None:
    """The first whole-number part of a module path: model.layers.7.mlp -> 7."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)
