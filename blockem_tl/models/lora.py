"""Live LoRA adapters in a bridged model: added, switched and removed at any time, on one copy of the weights::

with model.using("base"): ...       # the weights without any adapter
with model.using("sft"): ...        # an adapter that the model holds
with model.using("runs/sft"): ...   # one saved in a folder, for the time of the block
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from blockem_tl.models._adapter_config import check_config
from blockem_tl.models._adapter_files import FILES, AdapterFiles, check_order
from blockem_tl.models._peft_bridge import WRAPPER, bridged_config, check_reached, check_targets, take_out, tuner_layers
from blockem_tl.storage import fingerprints

BASE = "base"
"""Names the weights without any adapter, wherever an adapter is asked for."""

LLAMA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LiveAdapters(AdapterFiles):
    """The part of `Model` that holds adapters. It lives in a bridge, whose attributes it uses.

    source: where the base weights came from.
    """

    source: str
    original_model: nn.Module
    cfg: Any

    def _hold_none(self) -> None:
        # through __dict__: as a registered submodule peft's model would hold the weights twice
        self.__dict__.update(_peft=None, _plain_configs={}, _chosen=[], _layers=[])

    def _adopt(self, peft: PeftModel, trained: Sequence[nn.Parameter]) -> None:
        """Take the adapters of a live PeftModel as our own; its trainable tensors stay trainable."""
        self.__dict__["_plain_configs"].update(peft.peft_config)
        self.__dict__.update(_peft=peft, _layers=tuner_layers(self.original_model))
        for parameter in trained:
            parameter.requires_grad_(True)
        check_reached(self.hf, self.adapter_parameters(cast(str, peft.active_adapter)))

    @property
    def hf(self) -> nn.Module:
        """The transformers model, or the PeftModel around it once there is an adapter. Calling it fires the hooks."""
        return self.__dict__["_peft"] or self.original_model

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.original_model.parameters()).device

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters held, in order of arrival."""
        return list(self.__dict__["_plain_configs"])

    @property
    def active_adapter(self) -> str | None:
        """The adapter that acts now; None where there is none, or under ``using("base")``."""
        chosen, peft = self.__dict__["_chosen"], self.__dict__["_peft"]
        if chosen:
            return None if chosen[-1] == BASE else chosen[-1]
        return None if peft is None else cast(str, peft.active_adapter)

    @contextmanager
    def using(self, adapter: str | Path | None) -> Iterator["LiveAdapters"]:
        """Inside the block "base", else an adapter held under that name, else one saved in that folder acts; None: the model as it stands.

        Blocks nest. Afterwards what acted before acts again; what is trainable does not change, and a folder's adapter is gone.

        Raises:
            ValueError: neither "base", nor an adapter held, nor an adapter's folder that fits the model.
        """
        with self.holding(adapter) as name, self._acting(name):
            yield self

    @contextmanager
    def holding(self, adapter: str | Path | None) -> Iterator[str | None]:
        """Inside the block the model holds ``adapter``, under the name that is given back; what acts does not change.

        For work that switches often: `using` by that name costs microseconds, by a folder it loads the adapter every time.
        """
        self.check_adapter(adapter)
        if adapter is None or adapter == BASE or adapter in self.adapters:
            yield None if adapter is None else str(adapter)
            return
        given = Path(adapter).resolve().name.replace(".", "_")  # torch takes no module name with a dot
        name = next(n for n in chain([given], (f"{given}-{i}" for i in count(2))) if n not in (BASE, *self.adapters))
        acts = self.active_adapter or BASE
        with self.adapters_kept():
            self._load(Path(adapter), name)
        try:
            with self._acting(acts):  # where there was no adapter, the new one would act
                yield name
        finally:
            with self.adapters_kept():
                self._remove(name)

    def check_adapter(self, adapter: str | Path | None) -> None:
        """Raise ValueError unless ``adapter`` is something that `using` takes: None, "base", an adapter held, or an adapter's folder."""
        if adapter is None or adapter == BASE or adapter in self.adapters:
            return
        if not all((Path(adapter) / name).is_file() for name in FILES):
            raise ValueError(
                f"unknown adapter {str(adapter)!r}: expected {BASE!r}, one that the model holds ({self.adapters or 'none'}), or the "
                "folder of one; load it with model.load_adapter"
            )

    @contextmanager
    def _acting(self, name: str | None) -> Iterator[None]:
        if name is None:
            yield
            return
        # peft's own disable_adapter re-enables on leaving an inner block, turns requires_grad off and on and costs milliseconds.
        layers: list[Any] = self.__dict__["_layers"]
        before = [(layer, layer._disable_adapters, layer._active_adapter) for layer in layers]
        for layer in layers:
            layer._disable_adapters = name == BASE
            layer._active_adapter = layer._active_adapter if name == BASE else [name]
        self.__dict__["_chosen"].append(name)
        try:
            yield
        finally:
            self.__dict__["_chosen"].pop()
            for layer, disabled, active in before:
                layer._disable_adapters, layer._active_adapter = disabled, active

    @contextmanager
    def adapters_kept(self) -> Iterator[None]:
        """After the block the adapter that acts and what is trainable are as before it."""
        peft = self.__dict__["_peft"]
        before = None if peft is None else cast(str, peft.active_adapter)
        trainable = [(p, p.requires_grad) for name in self.adapters for p in self.adapter_parameters(name)]
        try:
            yield
        finally:
            if before in self.adapters:
                self.__dict__["_peft"].set_adapter(before)
            for parameter, required in trainable:
                parameter.requires_grad_(required)

    def use_adapter(self, name: str) -> None:
        """Make ``name`` the adapter that acts from now on (and the only trainable one).

        Raises:
            ValueError: an unknown name, or a call inside of `using`.
        """
        self._check_outside("use_adapter")
        self._use(name)

    def _check_outside(self, call: str) -> None:
        if self.__dict__["_chosen"]:
            raise ValueError(
                f"{call}: expected a call outside of model.using(...), which decides what acts meanwhile; leave the block first"
            )

    def _use(self, name: str) -> None:
        self.adapter_config(name)
        cast(PeftModel, self.__dict__["_peft"]).set_adapter(name)

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
        overwrite: bool = False,
    ) -> None:
        """Add a fresh LoRA adapter (B = 0, so nothing changes yet), trainable and active.

        Args:
            target_modules: names of linear modules; each has to match one at least.
            up_to_block: last block that gets LoRA ("freeze downstream" of a site is the site's own block); None for all blocks.
            seed: of LoRA's A matrices.  overwrite: replace an adapter that is held under this name.

        Raises:
            ValueError: a name already held, a block out of range, or a target that matches nothing.
            RuntimeError: modules through which no gradient reaches the adapter.
        """
        if up_to_block is not None and not 0 <= up_to_block < self.cfg.n_layers:
            raise ValueError(f"up_to_block: expected 0..{self.cfg.n_layers - 1}, got {up_to_block}")
        check_targets(self.original_model, target_modules)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=list(target_modules),
            layers_to_transform=None if up_to_block is None else list(range(up_to_block + 1)),
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.source,
        )
        with self.replacing_adapter(name, overwrite):
            self._inject(name, config, seed)

    def load_adapter(self, folder: str | Path, name: str = "default", *, overwrite: bool = False) -> None:
        """Load a LoRA adapter in peft's plain format; it becomes active, not trainable. ``overwrite`` replaces one of the same name.

        Raises:
            ValueError: no adapter in the folder (or the name given first), not LoRA, a field of its configuration that is refused (by its
                name), targets absent in this model, or tensors that are missing, left over, of another shape or not finite. Then
                the model is as it was.
        """
        check_order(folder, name)
        with self.replacing_adapter(name, overwrite):
            self._load(Path(folder), name)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter. Raises ValueError for an unknown name, or a call inside of `using`."""
        self._check_outside("remove_adapter")
        self._remove(name)

    def _remove(self, name: str) -> None:
        self.adapter_config(name)
        peft = cast(PeftModel, self.__dict__["_peft"])
        del self.__dict__["_plain_configs"][name]
        if self.adapters:
            if peft.active_adapter == name:
                peft.set_adapter(self.adapters[-1])
            peft.delete_adapter(name)
        else:
            take_out(self.original_model, name)
            self.__dict__.update(_peft=None, _layers=[])

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        """The tensors of one adapter: A [rank in], B [out rank], and what else acts, DoRA's magnitudes and LoRA's biases [out]."""
        own = re.compile(rf"\.lora_\w+\.{re.escape(name)}(\.|$)")
        return [parameter for key, parameter in self.hf.named_parameters() if own.search(key)]

    def fingerprint(self, adapter: str | None = None) -> str:
        """SHA-256 over the base model's weights, and over an adapter's if one is named; whatever LoRA layers there are besides."""
        named = ((name.replace(WRAPPER, "").replace(".base_layer", ""), p) for name, p in self.original_model.named_parameters())
        plain = {name: parameter for name, parameter in named if ".lora_" not in name}
        chosen = {f"lora.{i}": p for i, p in enumerate(self.adapter_parameters(adapter))} if adapter not in (None, BASE) else {}
        return fingerprints.of_tensors({**plain, **chosen})

    def adapter_config(self, name: str | None) -> LoraConfig:
        """An adapter's peft configuration, with plain module names. Raises ValueError for an unknown name."""
        if name not in self.__dict__["_plain_configs"]:
            raise ValueError(f"no adapter {name!r}: this model holds {self.adapters or 'none'}; add_adapter or load_adapter first")
        return self.__dict__["_plain_configs"][name]

    def _inject(self, name: str, plain: LoraConfig, seed: int) -> None:
        """Put LoRA layers into the live, bridged modules: peft sees the full bridged paths, everything saved the plain ones."""
        check_config(name, plain)
        config = bridged_config(self.original_model, plain)
        with self._taken_out_on_failure(name), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft = self.__dict__["_peft"]
            if peft is None:
                self.__dict__["_peft"] = get_peft_model(cast(PreTrainedModel, self.original_model), config, adapter_name=name)
            else:
                peft.add_adapter(name, config)
            self.__dict__["_plain_configs"][name] = plain
        self.hf.train(self.original_model.training)  # fresh layers come in training mode, where an adapter's dropout acts
        self.__dict__["_layers"] = tuner_layers(self.original_model)
        try:
            self._use(name)
            with self._acting(name):
                check_reached(self.hf, self.adapter_parameters(name))
        except BaseException:
            self._remove(name)
            raise

    @contextmanager
    def _taken_out_on_failure(self, name: str) -> Iterator[None]:
        """If the block fails, the layers that peft has injected by then under ``name`` are taken out again."""
        try:
            yield
        except BaseException:
            peft = self.__dict__["_peft"]
            take_out(self.original_model, name)
            if peft is not None:
                peft.peft_config.pop(name, None)
            raise
