"""Sparse autoencoders through SAELens: loading, identity, and whether one fits a model.

An SAE here is SAELens's own `SAE`. The penalty and the analyses *read* the residual stream with it; they never splice it into a
forward that is trained (the error term is detached there, and upstream gradients are wrong by about 200 %).
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE

from blockem_tl.hooks import HasHookPoints, resolve
from blockem_tl.models.load import default_device
from blockem_tl.storage import embedded

_RESIDUAL = re.compile(r"blocks\.\d+\.(hook_resid_(pre|mid|post)|hook_in|hook_out)$")


def load_sae(name: str | Path, sae_id: str | None = None, *, dtype: str = "float32", device: str | torch.device | None = None) -> SAE[Any]:
    """Load an SAE: an embedded name ("organism"), a local SAELens folder, or a SAELens release with its ``sae_id``.

    Args:
        sae_id: of a release, which of its SAEs; of a folder, the subfolder that holds the SAE. The organism has one at every block's
            output, under its site: ``load_sae("organism", "blocks.3.hook_resid_post")``; without ``sae_id`` the one at its own site.
        device: a GPU when there is one, as for `load_model`.

    Raises:
        ValueError: neither a folder nor a known release, a release without ``sae_id``, or a folder without the SAE that was asked for.
    """
    device = default_device(device)
    folder = embedded.folder_of("sae", str(name)) or Path(name)
    if not folder.exists() and sae_id is not None:
        return SAE.from_pretrained(str(name), sae_id, device=str(device), dtype=dtype)
    chosen = folder if sae_id is None or sae_id == _site_in(folder) else folder / sae_id
    if (chosen / "cfg.json").is_file():
        return SAE.load_from_disk(chosen, device=str(device), dtype=dtype)
    there = sorted(path.parent.relative_to(folder).as_posix() for path in folder.glob("*/cfg.json"))
    raise ValueError(
        f"cannot load an SAE from {str(name)!r}{'' if sae_id is None else f' and {sae_id!r}'}: expected an embedded name, a SAELens folder "
        "(cfg.json and sae_weights.safetensors), or a SAELens release or folder together with sae_id"
        + (f"; there are {', '.join(there)}" if there else "")
    )


def _site_in(folder: Path) -> str | None:
    """The site of the SAE that lies in the folder itself."""
    config = folder / "cfg.json"
    return json.loads(config.read_text()).get("metadata", {}).get("hook_name") if config.is_file() else None


def site_of(sae: SAE[Any]) -> str:
    """The hook name that the SAE was trained at. Raises ValueError where the SAE does not say."""
    site = sae.cfg.metadata.hook_name
    if not site:
        raise ValueError("this SAE names no site: set sae.cfg.metadata.hook_name to the TransformerLens hook name it was trained at")
    return site


def check_fits(sae: SAE[Any], model: HasHookPoints) -> str:
    """The SAE's site, after checking that the model has it and that widths and units agree. Raises ValueError where they do not."""
    site = site_of(sae)
    resolve(model.hook_dict, site)
    width = getattr(getattr(model, "cfg", None), "d_model", sae.cfg.d_in)
    if sae.cfg.d_in != width and _RESIDUAL.match(site):
        raise ValueError(
            f"the SAE reads {sae.cfg.d_in} dimensions at {site}, the model's residual stream has {width}: wrong SAE for this model"
        )
    if (kind := sae.cfg.normalize_activations) in ("expected_average_only_in", "covariance_whitening"):
        raise ValueError(
            f"this SAE was trained on inputs scaled by {kind!r}, and the scaling is not in its weights, so it would read and reconstruct "
            "in other units: fold it in first (sae.fold_activation_norm_scaling_factor or sae.fold_activation_whitening)"
        )
    return site
