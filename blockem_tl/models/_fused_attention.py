"""Attention as one fused operation, which never holds the pattern [n_heads pos pos], wherever nobody looks inside of it."""

from copy import copy
from typing import Any, cast

from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import AttentionBridge, PositionEmbeddingsAttentionBridge

_AROUND = ("hook_in", "hook_out")
_WIDER = ("use_split_qkv_input", "use_attn_in", "use_attn_result")
_LEFT_OUT = ("attn_logit_softcapping", "sinks")
"""What some models do to their scores and the fused operation does not."""


class FusedAttention(PositionEmbeddingsAttentionBridge):
    """TransformerLens's attention, run by transformers' own module with PyTorch's `scaled_dot_product_attention`.

    A forward in which a hook sits on what that operation does not make (scores, pattern, rotated queries and keys) goes the eager way, so
    that every hook fires.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("output_attentions") or any(getattr(self.config, name, False) for name in _WIDER) or self._watched_inside():
            return super().forward(*args, **kwargs)
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        output, _ = cast(Any, self.original_component)(hidden_states=self.hook_in(hidden), **kwargs)
        return self.hook_out(output), None

    def _watched_inside(self) -> bool:
        points = ((name, part) for name, part in self.named_children() if isinstance(part, HookPoint))
        return any(part.fwd_hooks or part.bwd_hooks for name, part in points if name not in _AROUND)


def fuse(model: nn.Module) -> None:
    """Let every attention of a bridged model run fused. The model's own configuration stays eager, so that its masks hold every entry.

    Raises:
        ValueError: an attention of another kind, or one that does more to its scores than this operation.
    """
    found = [part for part in model.modules() if isinstance(part, AttentionBridge)]
    others = sorted({type(part).__name__ for part in found if type(part) not in (PositionEmbeddingsAttentionBridge, FusedAttention)})
    extra = [name for name in _LEFT_OUT if any(getattr(part.original_component, name, None) is not None for part in found)]
    if not found or others or extra:
        raise ValueError(
            f'load_model: attention="sdpa" is for attention with rotary positions and nothing more (Llama, Qwen), this model has '
            f'{", ".join(others + extra) or "none"}: load it with attention="eager"'
        )
    for part in found:
        original = cast(Any, part.original_component)
        original.config = copy(original.config)  # this module's alone
        original.config._attn_implementation = "sdpa"
        part.__class__ = FusedAttention
