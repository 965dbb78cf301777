"""Sparse autoencoders through SAELens: loading, decoder directions, and reading only the latents asked for.

An SAE here is SAELens's own `SAE`. The penalty and the analyses *read* the residual stream with it; they never splice it into a
forward that is trained (the error term is detached there, and upstream gradients are wrong by about 200 %).
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from blockem_tl import embedded
from blockem_tl.hooks import HasHookPoints, resolve
from blockem_tl.models import default_device

_RESIDUAL = re.compile(r"blocks\.\d+\.(hook_resid_(pre|mid|post)|hook_in|hook_out)$")
_COLUMNWISE = {"standard", "jumprelu", "gated"}  # a latent needs only its own column; TopK kinds compare all pre-activations


def load_sae(name: str | Path, sae_id: str | None = None, *, dtype: str = "float32", device: str | torch.device | None = None) -> SAE[Any]:
    """Load an SAE: an embedded name ("organism"), a local SAELens folder, or a SAELens release with its ``sae_id``.

    Args:
        sae_id: of a release, which of its SAEs; of a folder, the subfolder that holds the SAE. The organism has one at every block's
            output, under its site: ``load_sae("organism", "blocks.3.hook_resid_post")``; without ``sae_id`` the one at its own site.
        device: a GPU when there is one, as for :func:`blockem_tl.models.load_model`.

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


def fingerprint(sae: SAE[Any]) -> str:
    """SHA-256 over the SAE's weights and over what its latents' values depend on besides (kind, k, normalisation, ...).

    It is taken in float32 wherever the weights lie, but weights rounded to bf16 are other weights: load SAEs in their published dtype.
    """
    settings = {key: value for key, value in sae.cfg.to_dict().items() if key not in ("metadata", "device", "dtype")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(sae.state_dict().items()):
        values = tensor.detach().float().cpu().contiguous()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def norms(sae: SAE[Any], latents: Sequence[int]) -> dict[str, Any]:
    """What a weight or a dose found with this SAE is relative to: median encoder and decoder norms of the latents, and a hash of all."""
    columns = list(latents)
    encoder, decoder = sae.W_enc.detach()[:, columns].float().norm(dim=0).cpu(), sae.W_dec.detach()[columns].float().norm(dim=-1).cpu()
    rounded = torch.cat([encoder, decoder]).numpy().round(4)
    return {
        "encoder": float(encoder.median()),
        "decoder": float(decoder.median()),
        "fingerprint": hashlib.sha256(rounded.tobytes()).hexdigest()[:16],
    }


def neuronpedia_link(place: str | None, latent: int) -> str | None:
    """The latent's Neuronpedia page; ``place`` is the SAE's ``cfg.metadata.neuronpedia_id``, None where it has none."""
    return f"https://www.neuronpedia.org/{place}/{latent}" if place else None


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


def check_latents(sae: SAE[Any], latents: Sequence[int]) -> None:
    """Raise ValueError unless every index is one of the SAE's latents."""
    bad = [k for k in latents if not 0 <= k < sae.cfg.d_sae]
    if bad:
        raise ValueError(f"latents: expected indices in 0..{sae.cfg.d_sae - 1} (the SAE's d_sae is {sae.cfg.d_sae}), got {bad[:5]}")


def decoder_directions(sae: SAE[Any], latents: Sequence[int]) -> Float[Tensor, "n_latents d_model"]:
    """Unit-norm decoder rows d_k / |d_k| of the chosen latents: the steering directions (paper A.3).

    Raises:
        ValueError: an index out of range, or a latent whose decoder row is zero.
    """
    check_latents(sae, latents)
    rows = sae.W_dec.detach()[list(latents)].float()
    norms = rows.norm(dim=-1, keepdim=True)
    if (norms == 0).any():
        raise ValueError(
            f"latents {[k for k, n in zip(latents, norms[:, 0], strict=True) if n == 0]} have zero decoder rows: nothing to steer along"
        )
    return rows / norms


def encode_latents(
    sae: SAE[Any], activations: Float[Tensor, "*batch d_model"], latents: Sequence[int]
) -> Float[Tensor, "*batch n_latents"]:
    """z_k of the chosen latents, with exactly the values of the SAE's full encode, in the SAE's dtype; gradients flow to ``activations``.

    ReLU, JumpReLU and gated SAEs compute just those columns, as constants; every other kind (TopK, BatchTopK loaded as TopK, ...) runs its
    full encode, where parameters that require a gradient get one: freeze such an SAE first.
    """
    columns = torch.as_tensor(list(latents), device=sae.W_dec.device)
    kind = sae.cfg.architecture()
    if kind not in _COLUMNWISE:
        full = sae.encode(activations)
        return (full.to_dense() if full.is_sparse else full)[..., columns]
    x, weights = sae.process_sae_in(activations), sae.W_enc.detach()[:, columns]

    def chosen(parameter: str) -> Float[Tensor, " n_latents"]:
        return getattr(sae, parameter).detach()[columns]  # the biases differ from kind to kind

    if kind == "gated":
        gate = (x @ weights + chosen("b_gate")) > 0
        return gate.to(sae.dtype) * sae.activation_fn(x @ (weights * chosen("r_mag").exp()) + chosen("b_mag"))
    pre = x @ weights + chosen("b_enc")
    acts = sae.activation_fn(pre)
    return acts * (pre > chosen("threshold")).to(acts.dtype) if kind == "jumprelu" else acts
