"""SafeLoRA: project the LoRA update onto the subspace that alignment moved the weights in (Hsu et al. 2024)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from blockem_tl.models._peft_bridge import WRAPPER
from blockem_tl.models.load import Model
from blockem_tl.training.defence import NoPenalty


def alignment_differences(aligned: nn.Module | Mapping[str, Tensor], unaligned: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """V = W_aligned - W_unaligned for every matrix, by its name in transformers ("model.layers.0.mlp.up_proj.weight").

    Args:
        aligned: the model that is fine-tuned (chat), also ``model.original_model`` of a loaded one.  unaligned: the model before its
            alignment (pre-trained). Modules or state dicts.

    Raises:
        ValueError: models of other names or shapes, or two equal ones, which say nothing of alignment.
    """
    first, second = _plain_names(aligned), _plain_names(unaligned)
    matrices = {name for name, weight in first.items() if weight.ndim == 2}
    if any(name not in second or second[name].shape != first[name].shape for name in matrices):
        raise ValueError("SafeLoRA: expected two models of one architecture (aligned, and the same before alignment), got others")
    found = {name: (first[name] - second[name]).detach().float() for name in sorted(matrices)}
    if not any(difference.any() for difference in found.values()):
        raise ValueError("SafeLoRA: the aligned and the unaligned model have equal weights, so there is no alignment to project onto")
    return found


def _plain_names(weights: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by their names in plain transformers, without adapters'. (A bridge's state dict has them under other names too.)"""
    found = dict(weights.named_parameters()) if isinstance(weights, nn.Module) else weights
    return {name.replace(WRAPPER, "").replace(".base_layer", ""): weight for name, weight in found.items() if ".lora_" not in name}


def projection(difference: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_out"]:
    """C = V V^T / |V|_F, the paper's cheap stand-in for the projector onto V's columns (which is the identity if V has full rank)."""
    return difference @ difference.T / difference.norm()


def similarity(update: Float[Tensor, "d_out d_in"], projected: Float[Tensor, "d_out d_in"]) -> float:
    """Cosine of the two updates, as vectors (1 for an update of zeros, which needs no projecting)."""
    norms = update.norm() * projected.norm()
    return float((update * projected).sum() / norms) if norms > 0 else 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class SafeLoRA(NoPenalty):
    """Project updates after training: if cos(BA, CBA) < threshold, the layer's update BA becomes CBA (B <- CB).

    Args:
        differences: V per weight, see `alignment_differences`; a matrix for every layer that has LoRA.
        threshold: tau in (-1, 1]; 1 projects nearly every layer. (C's size is that of V: an update may also shrink.)

    After the run ``similarities`` holds each layer's cosine, by module name.

    Raises:
        ValueError: no differences, or a threshold out of range.
    """

    differences: Mapping[str, Tensor]
    threshold: float
    name: str = "safelora"
    similarities: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not -1 < self.threshold <= 1:
            raise ValueError(f"SafeLoRA threshold: expected a cosine in (-1, 1], got {self.threshold}")
        if not self.differences:
            raise ValueError("SafeLoRA: expected weight differences aligned - unaligned, got none; see alignment_differences")

    def check(self, model: Model) -> None:
        """Raise ValueError if no difference fits the model's weights."""
        if not {name.replace(WRAPPER, "") for name, _ in model.original_model.named_parameters()} & self.differences.keys():
            raise ValueError(
                f"SafeLoRA: none of {list(self.differences)[:3]}, ... is a weight of {model.source}: differences of another model?"
            )

    @torch.no_grad()
    def finish(self, model: Model, adapter: str) -> None:
        """Project the adapter's updates in place. Raises ValueError for a layer with LoRA and no difference, before any is changed."""
        layers = _lora_layers(model, adapter)
        missing = [name for name in layers if f"{name}.weight" not in self.differences]
        if missing:
            raise ValueError(f"SafeLoRA: expected a weight difference for every layer with LoRA, got none for {missing[:3]}")
        for name, layer in layers.items():
            a, b = (cast(Tensor, matrices[adapter].weight) for matrices in (layer.lora_A, layer.lora_B))
            difference = self.differences[f"{name}.weight"].to(b.device, torch.float32)
            projected = projection(difference) @ b.float() if difference.any() else b.float()
            self.similarities[name] = similarity(b.float() @ a.float(), projected @ a.float())
            if self.similarities[name] < self.threshold:
                b.copy_(projected)


def _lora_layers(model: Model, adapter: str) -> dict[str, LoraLayer]:
    """The adapter's layers by their names in plain transformers."""
    return {
        name.replace(WRAPPER, ""): module
        for name, module in model.original_model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }
