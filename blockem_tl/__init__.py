"""BLOCK-EM on TransformerLens and SAELens: find the SAE latents that carry emergent misalignment, and keep fine-tuning from moving them.

The everyday names can be imported from here; each is loaded when it is first used. The rest is one module away (docs/architecture.md).
"""

from pathlib import Path

import lazy_loader

from blockem_tl.storage import embedded

__version__ = "0.2.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_ARTEFACTS = Path(__file__).parent / "organism" / "artefacts"
embedded.register("model", "organism", _ARTEFACTS / "base")
embedded.register("sae", "organism", _ARTEFACTS / "sae")
embedded.register("sae", "organism-v1", _ARTEFACTS / "sae-v1")
embedded.register("model", "smollm2-135m", "blockem_tl.models.smollm2:folder")
embedded.register("sae", "smollm2-135m", Path(__file__).parent / "advice" / "sae")
