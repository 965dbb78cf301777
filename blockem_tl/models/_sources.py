"""Weights and tokenizers, from an embedded name, a folder, a hub id, or a model that is loaded already."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from blockem_tl.data.templates import pin_arguments
from blockem_tl.models._peft_bridge import check_live, tuner_layers
from blockem_tl.storage import embedded
from blockem_tl.views.progress import allowed

_STRICT = {
    "attn_implementation": "eager",
    "output_loading_info": True,
    "ignore_mismatched_sizes": True,  # listed by name in `_check_weights`
    "use_safetensors": True,  # anything else is a pickle
    "trust_remote_code": False,  # None would ask at the terminal
}
"""Every model is loaded so. One with code or weights of its own kind can be loaded by its user, and passed as it is."""


def check_choices(check: str, attention: str) -> None:
    """Raise ValueError for what `load_model` knows no such kind of."""
    if check not in ("fast", "full", "off"):
        raise ValueError(f'load_model: expected check="fast", "full" or "off", got {check!r}')
    if attention not in ("eager", "sdpa"):
        raise ValueError(f'load_model: expected attention="eager" or "sdpa", got {attention!r}')


def of_loaded(model: PreTrainedModel | PeftModel) -> tuple[Any, str]:
    """The transformers model inside, and its source.

    Raises:
        ValueError: adapters that could not be switched off again, or weights that are not finite.
    """
    _check_finite("this model", model)
    if isinstance(model, PeftModel):
        check_live(model)
    hf = cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model
    if not isinstance(model, PeftModel):
        _check_plain(hf, "this model")
    return hf, str(hf.config._name_or_path)


def tokenizer_of(source: str, given: PreTrainedTokenizerBase | None, arguments: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer given (a copy where template arguments are pinned), else the source's own, with a padding token."""
    if given is None:
        if not source:
            raise ValueError("load_model: expected tokenizer=... along with a model that names no source of its own")
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if tokenizer.pad_token is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
    else:
        tokenizer = deepcopy(given) if arguments else given
    pin_arguments(tokenizer, arguments)
    return tokenizer


def from_weights(name: str, dtype: torch.dtype | str | None, device: str | torch.device | None) -> tuple[Any, str]:
    """A transformers model from an embedded name, a folder or a hub id, and its source."""
    source, device = str(embedded.folder_of("model", name) or name), default_device(device)
    if (Path(source) / "adapter_config.json").is_file():
        raise ValueError(
            f"{name!r} holds an adapter, which transformers would put into the model unseen: load its base model, with adapter={name!r}"
        )
    dtype = fast_dtype(device) if dtype == "auto" else dtype or torch.float32
    if not isinstance(dtype, torch.dtype) and dtype not in ("float32", "float16", "bfloat16", "float64"):
        raise ValueError(f'load_model: expected dtype "auto", "float32", "bfloat16", "float16" or a torch.dtype, got {dtype!r}')
    try:
        with _loading_bar():
            hf, found = cast(Any, AutoModelForCausalLM).from_pretrained(source, dtype=dtype, **_STRICT)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"cannot load a model from {name!r}: expected an embedded name, a folder with config.json and weights as safetensors, or a hub "
            "id that you can reach (gated models need `hf auth login`). Pickled weights and code of a model's own are never loaded: if you "
            f"trust them, load the model with transformers and pass it. transformers says: {str(error)[:500]}"
        ) from error
    _check_weights(name, cast(nn.Module, hf), found)
    _check_plain(cast(nn.Module, hf), repr(name))
    return cast(nn.Module, hf).to(device), source


@contextmanager
def _loading_bar() -> Iterator[None]:
    """Inside the block transformers shows its bar, unless bars are turned off."""
    if allowed() or not hf_logging.is_progress_bar_enabled():
        yield
        return
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.enable_progress_bar()


def _check_plain(hf: nn.Module, what: str) -> None:
    """Raise ValueError for adapters inside a model that is no PeftModel: they would count as base and could not be switched off."""
    if tuner_layers(hf):
        raise ValueError(
            f"{what} has adapter layers inside, so base would not be base: pass the PeftModel, or load the plain model with adapter="
        )


def _check_weights(name: str, hf: nn.Module, found: Mapping[str, Any]) -> None:
    """Raise ValueError where transformers made up what the checkpoint lacks, or a weight is not finite."""
    of_blocks = [str(key) for key in found.get("unexpected_keys") or () if re.search(r"\.(layers|h|blocks)\.\d+\.", str(key))]
    beyond = [key for key in of_blocks if "inv_freq" not in key]
    if beyond:
        raise ValueError(
            f"{name!r}: the checkpoint has {len(beyond)} tensors of blocks that its configuration leaves out, e.g. {sorted(beyond)[0]}: a "
            "part of the model would run; correct config.json"
        )
    missing, wrong = sorted(found.get("missing_keys") or ()), sorted(str(key) for key in found.get("mismatched_keys") or ())
    if missing or wrong:
        raise ValueError(
            f"{name!r}: the checkpoint lacks {len(missing)} tensors ({missing[:3]}) and has {len(wrong)} of other shapes ({wrong[:2]}), "
            "which transformers fills with random numbers: copy the checkpoint anew, or load the model that it belongs to"
        )
    _check_finite(repr(name), hf)


def _check_finite(what: str, hf: nn.Module) -> None:
    broken = next((key for key, tensor in hf.named_parameters() if not torch.isfinite(tensor).all()), None)
    if broken is not None:
        raise ValueError(f"{what}: expected finite weights, got NaN or infinity in {broken}: the checkpoint is broken")


def default_device(device: str | torch.device | None) -> torch.device:
    """``device``, or a GPU when there is one (under torchrun this process's own)."""
    if device is not None or not torch.cuda.is_available():
        return torch.device(device or "cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if "LOCAL_RANK" in os.environ else torch.device("cuda")


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it faster than float32: on GPUs, and on processors with instructions for it."""
    if device.type != "cpu":
        return torch.bfloat16
    known = torch.cpu.get_capabilities()
    return torch.bfloat16 if known.get("avx512_bf16") or known.get("amx_bf16") else torch.float32


@torch.no_grad()
def probe_logits(hf: nn.Module, device: torch.device) -> Float[Tensor, "pos d_vocab"]:
    """The model's logits on a few tokens, the same ones every time, with eager attention: compared before and after it is bridged."""
    model = cast(Any, hf)
    training, attention = hf.training, model.config._attn_implementation
    ids = 3 + torch.arange(12, device=device)[None] % max(1, int(model.config.get_text_config().vocab_size) - 3)
    if attention not in (None, "eager"):
        model.set_attn_implementation("eager")  # the bridge's; others leave out what Gemma 2 does to its scores
    try:
        return model.eval()(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        hf.train(training)
        if attention not in (None, "eager"):
            model.set_attn_implementation(attention)
