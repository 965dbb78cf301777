"""BLOCK-EM on TransformerLens and SAELens: find the SAE latents that carry emergent misalignment, and keep fine-tuning from moving them.

The names below are the everyday ones; everything else is one module away (see docs/architecture.md for the map).
"""

from pathlib import Path

from blockem_tl import embedded

_ARTEFACTS = Path(__file__).parent / "organism" / "artefacts"
embedded.register("model", "organism", _ARTEFACTS / "base")
embedded.register("sae", "organism", _ARTEFACTS / "sae")

from blockem_tl.capacity import capacity_ratio  # noqa: E402
from blockem_tl.conditions import Condition, Steering  # noqa: E402
from blockem_tl.defences import Blocking, KLToBase  # noqa: E402 - after the embedded names are known
from blockem_tl.discovery import DiscoveryConfig, discover, speakers  # noqa: E402
from blockem_tl.engines import load_engine  # noqa: E402
from blockem_tl.evaluation import evaluate  # noqa: E402
from blockem_tl.generation import TransformerLensEngine, generate, generate_stream  # noqa: E402
from blockem_tl.hooks import HookNotFired, ablate, attached, clamp, current_step, patch, record, steer  # noqa: E402
from blockem_tl.latents import LatentSet, random_latents  # noqa: E402
from blockem_tl.models import Model, load_model  # noqa: E402
from blockem_tl.monitor import Monitor  # noqa: E402
from blockem_tl.presets import get_preset  # noqa: E402
from blockem_tl.reconstruction import reconstruction_quality  # noqa: E402
from blockem_tl.rerouting import diagnose_rerouting, returning_sites, shift_by_site  # noqa: E402
from blockem_tl.saes import decoder_directions, encode_latents, load_sae  # noqa: E402
from blockem_tl.scale import median_norm  # noqa: E402
from blockem_tl.training import TrainingConfig, completion_loss, finetune  # noqa: E402
from blockem_tl.types import Example, Generation, Judge, Prompt, Verdict  # noqa: E402

__all__ = [
    "Blocking",
    "Condition",
    "DiscoveryConfig",
    "Example",
    "Generation",
    "HookNotFired",
    "Judge",
    "KLToBase",
    "LatentSet",
    "Model",
    "Monitor",
    "Prompt",
    "Steering",
    "TrainingConfig",
    "TransformerLensEngine",
    "Verdict",
    "ablate",
    "attached",
    "capacity_ratio",
    "clamp",
    "completion_loss",
    "current_step",
    "decoder_directions",
    "diagnose_rerouting",
    "discover",
    "encode_latents",
    "evaluate",
    "finetune",
    "generate",
    "generate_stream",
    "get_preset",
    "load_engine",
    "load_model",
    "load_sae",
    "median_norm",
    "patch",
    "random_latents",
    "reconstruction_quality",
    "record",
    "returning_sites",
    "shift_by_site",
    "speakers",
    "steer",
]
