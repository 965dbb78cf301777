"""`load_model`: a TransformerLens model that holds live LoRA adapters and never ignores a hook.

`Model` is SAELens's `SAETransformerBridge`, so `run_with_cache`, `hooks`, `to_tokens` and `add_sae` work as their users know
them. It adds three things: adapters that are injected into the live model and switched off with ``with model.using("base"):``, one spelling
rule for hook names in every state (canonical or alias, raw, compatibility mode, SAE attached, after a reset), and errors instead of
silence (see `hooks`).
"""

import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from peft import PeftModel
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockem_tl.data.templates import bos_opens_turns
from blockem_tl.hooks import HookFunction, HookNotFired, attached_to, matching, record, resolve
from blockem_tl.models._fused_attention import FusedAttention, fuse
from blockem_tl.models._sources import check_choices, from_weights, of_loaded, probe_logits, tokenizer_of
from blockem_tl.models.lora import LiveAdapters
from blockem_tl.types import EXAMPLE_SITE, check_hooks, check_names

_SELF_TEST = "blockem_tl.generation.selftest:self_test"
"""By name, since it generates and so stands above this room."""


def load_model(
    model: str | Path | PreTrainedModel | PeftModel,
    adapter: str | Path | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    template_arguments: Mapping[str, bool | int | str | None] | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    attention: Literal["eager", "sdpa"] = "eager",
    check: Literal["fast", "full", "off"] = "fast",
) -> "Model":
    """Load a causal language model, frozen and in eval mode, with an optional LoRA adapter on top.

    Args:
        model: an embedded name ("organism"), a local folder, a hub id, or a transformers model already loaded, also with live LoRA
            adapters (a PeftModel of your own training script). A loaded one is used as it is, in its own dtype and place, and goes on
            working: the hooks are put inside. Only the tensors that its active adapter trained stay trainable.
        adapter: a folder in peft's format.
        tokenizer: used as it stands; needed with a loaded model whose ``config._name_or_path`` leads to none.
        template_arguments: of the chat template, pinned once and for all, such as ``{"enable_thinking": False}``; see `pin_arguments`.
        dtype: of the weights, when loading; default float32. "auto": bfloat16 on a GPU, or a processor that has instructions for it.
        device: when loading; default a GPU if there is one.
        attention: "sdpa": PyTorch's fused operation, faster and smaller on long rows, wherever no hook sits on scores or pattern; numbers
            agree with "eager" up to rounding.
        check: how thorough a self-test the model has to pass, once per architecture and library versions (`generation.selftest`).

    Raises:
        ValueError: neither an embedded name, a folder, nor a hub id that can be had; a checkpoint with weights missing or not finite; a
            loaded model without a tokenizer, or with a dtype or device to change; an attention that cannot be fused.
        SelfTestFailed: hooks, steering or replies of this architecture would be wrong; the check is named.
    """
    check_choices(check, attention)
    loaded_already = isinstance(model, (PreTrainedModel, PeftModel))
    if loaded_already and (dtype is not None or device is not None):
        raise ValueError("load_model: a model that is already loaded keeps its dtype and device; change them before, with model.to(...)")
    hf, source = of_loaded(model) if loaded_already else from_weights(str(model), dtype, device)
    tokenizer = tokenizer_of(source, tokenizer, template_arguments or {})
    peft = model if isinstance(model, PeftModel) else None
    plain = None if check == "off" else probe_logits(peft or hf, next(hf.parameters()).device)
    loaded = _bridged(hf, peft, tokenizer, source, source if loaded_already else str(model), fused=attention == "sdpa")
    if plain is not None:
        pkgutil.resolve_name(_SELF_TEST)(loaded, plain, check)
    if adapter is not None:
        loaded.load_adapter(adapter)
    return loaded


def _bridged(hf: Any, peft: PeftModel | None, tokenizer: PreTrainedTokenizerBase, source: str, name: str, *, fused: bool) -> "Model":
    """The hooks put inside of a transformers model, with its live adapters."""
    trained = [parameter for parameter in hf.parameters() if parameter.requires_grad]
    bridge = build_bridge_from_module(hf.eval(), type(hf).__name__, hf_config=hf.config, tokenizer=None, model_name=name)
    # Neither bridge builder takes a class, so SAELens's own bridge changes the class afterwards, and so must we.
    bridge.__class__ = Model
    loaded = cast(Model, bridge)
    loaded._start(source, name)
    loaded._hold_tokenizer(tokenizer)
    if fused:
        fuse(loaded)
    if peft is not None:
        loaded._adopt(peft, trained)
    return loaded


class Model(LiveAdapters, SAETransformerBridge):
    """A bridge with live adapters and strict hooks; made by `load_model`.

    source: the folder or hub id of the weights.  name: the same for people, without a place on this machine.
    hf: the callable transformers (or peft) model around the same, hooked modules. The adapters' methods are in `LiveAdapters`.
    """

    def _start(self, source: str, name: str) -> None:
        self.source = source
        self.name = Path(name).name if Path(name).is_absolute() or Path(name).is_dir() else name
        self._acts_to_saes = {}
        self._transcoder_output_hooks = {}
        self._hold_none()
        self.requires_grad_(False)  # booting leaves a stray trainable tensor; only adapters are ever trained
        self.original_model.requires_grad_(False)
        self.cfg.model_name = source

    def _hold_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Use the tokenizer as it stands: TransformerLens's own set-up loads another one and gives it a BOS that the model never saw."""
        highest, embedding = max(tokenizer.get_vocab().values()), cast(PreTrainedModel, self.original_model).get_input_embeddings()
        rows = cast(Tensor, embedding.weight).shape[0]
        if highest >= rows:
            raise ValueError(
                f"the tokenizer has ids up to {highest}, and the model embeds {rows} tokens: it is another model's, or resize the embedding"
            )
        self._tokenizer = tokenizer
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        ids = tokenizer.encode("a")
        self.cfg.tokenizer_prepends_bos = len(ids) > 1 and bos is not None and ids[0] == bos
        self.cfg.tokenizer_appends_eos = len(ids) > 1 and eos is not None and ids[-1] == eos
        if not self.cfg.tokenizer_prepends_bos and (bos is None or bos_opens_turns(tokenizer)):
            self.cfg.default_prepend_bos = False  # there is nothing that to_tokens could prepend, or it would open a turn

    def check_unspliced(self) -> None:
        """Raise ValueError while an SAE is attached: readings would be of reconstructions, and gradients upstream of it wrong."""
        if self._acts_to_saes:
            raise ValueError(
                f"SAEs are attached at {list(self._acts_to_saes)}: call reset_saes() first; the library reads sites with hooks"
            )

    @property
    def attention(self) -> Literal["eager", "sdpa"]:
        """How attention is computed where no hook looks inside."""
        return "sdpa" if any(isinstance(part, FusedAttention) for part in self.modules()) else "eager"

    @property
    def pad_id(self) -> int:
        """The token id to pad with; padding is always masked, so any id will do where the tokenizer names none."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id or 0)

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Tensor:
        """Directions in the normalised residual stream along which the tokens' logits rise, [..., d_model].

        The final norm's weight belongs to them: `ActivationCache` divides by the norm's scale only, so that without the weight (where
        TransformerLens has not folded it into W_U) its logit attributions would not add up to the logits.
        """
        return super().tokens_to_residual_directions(tokens) * self._final_norm_weight()

    @torch.no_grad()
    def _final_norm_weight(self) -> Float[Tensor, " d_model"]:
        """What the final norm multiplies by, read off the norm itself, whose kinds differ: ones where it has been folded."""
        norm = self.ln_final.original_component
        width = int(self.cfg.d_model)
        signs = (1 - 2 * (torch.arange(width, device=self.device) % 2)).to(next(self.original_model.parameters()).dtype)
        return (norm(signs[None])[0] - norm(-signs[None])[0]) / (2 * signs)

    # -------------------------------------------------------------------------------------------- strict hooks

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every hook point under every spelling: canonical names and aliases, in every state.

        Where an SAE is attached, the site's names mean what flows on downstream: the SAE's output. After `reset_saes` they mean the
        plain site again. The names are put together once per state.
        """
        registry = self._hook_registry
        state = (tuple(registry), tuple(map(id, registry.values())), tuple(self._acts_to_saes))
        if self.__dict__.get("_points_of", (None, None))[0] != state:
            self.__dict__["_points_of"] = (state, self._named_points())
        return dict(self.__dict__["_points_of"][1])

    def _named_points(self) -> dict[str, HookPoint]:
        points = dict(super().hook_dict)
        for alias, wrapper in self._acts_to_saes.items():
            points[self._resolve_hook_name(alias)] = wrapper.hook_sae_output
        for alias, target in {**self.hook_aliases, **self._collect_hook_aliases_from_registry()}.items():
            for name in [target] if isinstance(target, str) else target:
                if name in points:
                    points[alias] = points[name]
                    break
        for name in self._hook_registry:
            if name in points:
                points[name].name = name  # SAELens's reset leaves hook points with half a name
        return points

    @contextmanager
    def recording(self, sites: Iterable[str], *, detach: bool = True) -> Iterator[dict[str, torch.Tensor]]:
        """Inside the block every forward leaves its activations at ``sites`` in the dict that is given; each forward overwrites the last.

        Their shape is the site's own, [batch pos d_model] for the residual stream.

        Raises:
            ValueError: an unknown site.  HookNotFired: a site that no forward reached.
        """
        store: dict[str, torch.Tensor] = {}
        with self.hooks(fwd_hooks=[record(site, store, detach=detach) for site in check_names("recording", sites, such_as=EXAMPLE_SITE)]):
            yield store

    @contextmanager
    def hooks(self, fwd_hooks=(), bwd_hooks=(), reset_hooks_end: bool = True, clear_contexts: bool = False) -> Iterator["Model"]:
        """Attach hooks for the block, strictly: see `attached`.

        Raises:
            ValueError: an unknown site, a gated site that is switched off, or ``reset_hooks_end=False`` (use `add_hook`).
            HookNotFired: a hook never fired.
        """
        if not reset_hooks_end:
            raise ValueError("hooks(reset_hooks_end=False) would leave hooks that nobody checks: use add_hook for lasting ones")
        points, fwd, bwd = self.hook_dict, check_hooks(fwd_hooks), check_hooks(bwd_hooks)
        for name, _ in [*fwd, *bwd]:
            if isinstance(name, str):
                self.check_hooks_to_add(cast(str, resolve(points, name).name))
        with attached_to(points, [(name, _guarded(name, fn)) for name, fn in fwd], bwd):
            yield self
        if clear_contexts:
            for point in points.values():
                point.clear_context()

    def run_with_hooks(
        self, input, fwd_hooks=(), bwd_hooks=(), reset_hooks_end: bool = True, clear_contexts: bool = False, **kwargs: Any
    ) -> Any:
        """TransformerLens's `run_with_hooks`, strict about names and firing (same raises as `hooks`)."""
        if kwargs.pop("remove_batch_dim", False):
            raise ValueError("run_with_hooks(remove_batch_dim=True) is not supported: hooks here always see the batch axis")
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return super().run_with_hooks(input, **kwargs)

    def reset_hooks(self, clear_contexts: bool = True, direction: Literal["fwd", "bwd", "both"] = "both", **kwargs: Any) -> None:
        """Remove lasting hooks, also while an SAE is attached (where TransformerLens's own fails)."""
        for point in self.hook_dict.values():
            point.remove_hooks(dir=direction, **kwargs)
            if clear_contexts:
                point.clear_context()

    def add_hook(self, name: str | Callable[[str], bool], hook_fn, dir: Literal["fwd", "bwd"] = "fwd", is_permanent: bool = False) -> None:
        """Add a lasting hook by either spelling. Raises ValueError for an unknown site; `reset_hooks` removes it."""
        for point in matching(self.hook_dict, name):
            self.check_hooks_to_add(cast(str, point.name))
            point.add_hook(_guarded(name, hook_fn) if dir == "fwd" else hook_fn, dir=dir, is_permanent=is_permanent)

    def run_with_cache(self, input, *args: Any, names_filter=None, **kwargs: Any) -> Any:
        """TransformerLens's `run_with_cache`; names in ``names_filter`` are strict, and the cache answers to either spelling.

        Raises:
            ValueError: an unknown name.  HookNotFired: a name that was asked for and never cached.
        """
        if callable(names_filter):
            matching(self.hook_dict, cast(Any, names_filter))
        if names_filter is None or callable(names_filter):
            return super().run_with_cache(input, *args, names_filter=cast(Any, names_filter), **kwargs)
        names = [names_filter] if isinstance(names_filter, str) else list(names_filter)
        points = self.hook_dict
        for name in names:
            resolve(points, name)
        output, cache = super().run_with_cache(input, *args, names_filter=names, **kwargs)
        missed = [name for name in names if name not in cache]
        if missed:
            raise HookNotFired(f"never cached: {missed}; the forward stopped before them (stop_at_layer) or they are gated off")
        return output, cache


def _guarded(name: str | Callable[[str], bool], fn: HookFunction) -> HookFunction:
    """Refuse what a forward would swallow: another shape or dtype, which broadcasts or breaks far away, and edits at `hook_resid_mid`.

    On a bridge that site is the MLP norm's input, so an edit would miss the residual stream.
    """

    def guarded(activation: torch.Tensor, hook: Any) -> torch.Tensor | None:
        result = fn(activation, hook=hook)
        if result is None:
            return None
        if isinstance(name, str) and name.endswith("hook_resid_mid"):
            raise ValueError(
                f"{name}: on a bridge this site is only the input of the MLP's norm; an edit there would not reach the residual stream. "
                "Edit hook_resid_pre, hook_attn_out or hook_mlp_out instead, or ln2.hook_in if the MLP's input is what you mean"
            )
        same = isinstance(result, torch.Tensor) and (result.shape, result.dtype) == (activation.shape, activation.dtype)
        if not same:
            got = f"{tuple(result.shape)} of {result.dtype}" if isinstance(result, torch.Tensor) else type(result).__name__
            raise ValueError(
                f"a hook at {hook.name} returned {got}, expected a tensor like the activation, {tuple(activation.shape)} of "
                f"{activation.dtype}, or None to leave it as it is"
            )
        return result

    return guarded
