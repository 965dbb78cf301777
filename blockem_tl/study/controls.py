"""Latent sets to set beside K, for `Study.latents`: its best latents alone, and random ones, of all latents or of those that fire."""

import torch

from blockem_tl.discovery.diffing import mean_activations
from blockem_tl.generation.engine import generate
from blockem_tl.models.lora import BASE
from blockem_tl.saes.latent_set import LatentSet, random_latents
from blockem_tl.study.run import Point
from blockem_tl.study.setting import Setting


def first(setting: Setting, point: Point, *, n: int, beside: str = "k") -> LatentSet:
    """The best ``n`` latents of the study's set ``beside``."""
    return point.latents(setting.sae, beside).first(n)


def random_beside(setting: Setting, point: Point, *, beside: str, firing: bool = False) -> LatentSet:
    """As many latents as the study's set ``beside`` has, drawn from the others by the seed.

    Args:
        firing: only from those of `alive`, so that the control is not made of dead ones.
    """
    found = point.latents(setting.sae, beside)
    among = alive(setting, point) if firing else None
    return random_latents(setting.sae, len(found), seed=point.seed, among=among, exclude=found.latents)


def alive(setting: Setting, point: Point) -> list[int]:
    """The latents that fire somewhere in the core prompts and their replies, under base or the point's model."""
    found = torch.zeros(setting.sae.cfg.d_sae, dtype=torch.bool)
    for adapter in (BASE, point.adapter):
        options = {"adapter": adapter, "max_new_tokens": setting.preset.max_new_tokens, "progress": False}
        replies = [one for one in generate(setting.model, setting.prompts("core"), **options) if one.reply]
        with setting.model.using(adapter):
            found |= (mean_activations(setting.model, setting.sae, replies) > 0).any(0).cpu()
    return found.nonzero()[:, 0].tolist()
