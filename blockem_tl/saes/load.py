"""Sparse autoencoders through SAELens: loading, identity, and whether one fits a model.

An SAE here is SAELens's own `SAE`. The penalty and the analyses *read* the residual stream with it; they never splice it into a
forward that is trained (the error term is detached there, and upstream gradients are wrong by about 200 %).
"""

import re
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import SAE

from blockem_tl.hooks import HasHookPoints, resolve
from blockem_tl.models._sources import default_device
from blockem_tl.storage import embedded, files

CARD = "card.json"
"""Beside an SAE that `train_sae` made: what it is worth."""

HELD_OUT = "held_out_explained_variance"
"""Of an SAE's metadata, where its folder has such a card: the least over corpora and weights."""

_SWITCHES = ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm")
_KIND = ("architecture", "k", "normalize_activations", *_SWITCHES)
_RESIDUAL = re.compile(r"blocks\.\d+\.(hook_resid_(pre|mid|post)|hook_in|hook_out)$")


def load_sae(name: str | Path, sae_id: str | None = None, *, dtype: str = "float32", device: str | torch.device | None = None) -> SAE[Any]:
    """Load an SAE: an embedded name ("organism"), a local SAELens folder, or a SAELens release with its ``sae_id``.

    Args:
        sae_id: of a release, which of its SAEs; of a folder, the subfolder that holds the SAE. The organism has one at every block's
            output, under its site: ``load_sae("organism", "blocks.3.hook_resid_post")``; without ``sae_id`` the one at its own site.
        device: a GPU when there is one, as for `load_model`.

    Raises:
        ValueError: neither a folder nor a known release, a release without ``sae_id``, or a folder without the SAE that was asked for; a
            configuration or weights that are broken, or do not fit each other.
    """
    device = default_device(device)
    if dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise ValueError(f'load_sae: expected dtype "float32", "bfloat16" or "float16", got {dtype!r}')
    torch.zeros(1, device=device)  # a device that is not there is no fault of the file's
    folder = embedded.folder_of("sae", str(name)) or Path(name)
    if not folder.exists() and sae_id is not None:
        return checked(SAE.from_pretrained(str(name), sae_id, device=str(device), dtype=dtype), f"{name}/{sae_id}")
    chosen = folder if sae_id is None or sae_id == _site_in(folder) else folder / sae_id
    if (chosen / "cfg.json").is_file():
        return checked(_from_disk(chosen, str(device), dtype), str(chosen))
    there = sorted(path.parent.relative_to(folder).as_posix() for path in folder.glob("*/cfg.json"))
    raise ValueError(
        f"cannot load an SAE from {str(name)!r}{'' if sae_id is None else f' and {sae_id!r}'}: expected an embedded name, a SAELens folder "
        "(cfg.json and sae_weights.safetensors), or a SAELens release or folder together with sae_id"
        + (f"; there are {', '.join(there)}" if there else "")
    )


def _from_disk(folder: Path, device: str, dtype: str) -> SAE[Any]:
    """The SAE in a folder. Raises ValueError naming what is missing or broken, instead of what SAELens trips over."""
    config = files.read_json(folder / "cfg.json")
    missing = [field for field in ("d_in", "d_sae", "architecture") if field not in config] if isinstance(config, dict) else ["everything"]
    if missing:
        raise ValueError(f"{folder / 'cfg.json'}: expected an SAE's configuration as SAELens writes it, lacks {missing}")
    if wrong := _wrong_fields(config):
        raise ValueError(
            f"{folder / 'cfg.json'}: expected whole numbers above 0 (and k at most d_sae), {' and '.join(_SWITCHES)} as true or false, and "
            f"metadata as an object, got {str(wrong)[:200]}"
        )
    try:
        sae = SAE.load_from_disk(folder, device=device, dtype=dtype)
    except Exception as error:  # SAELens and its readers raise whatever they trip over
        raise ValueError(
            f"{folder}: the SAE's weights are broken, or do not fit its configuration: {str(error)[:300]}. Copy it anew, or save it again"
        ) from error
    if (held_out := _held_out(folder / CARD)) is not None:
        sae.cfg.metadata[HELD_OUT] = held_out
    return sae


def _held_out(card: Path) -> float | None:
    """The least explained variance on rows held out, by a card as `train_sae` writes it; None without one, or with one of another kind."""
    about = files.read_json(card) if card.is_file() else None
    rows = about.get("heldout") if isinstance(about, dict) else None
    shares = [row.get("explained_variance") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return min((share for share in shares if isinstance(share, int | float)), default=None)


def _wrong_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of an SAE's configuration that SAELens would take, or trip over, and that mean nothing."""
    wrong = {n: config[n] for n in ("d_in", "d_sae") if type(config[n]) is not int or config[n] < 1}
    wrong |= {n: config[n] for n in _SWITCHES if type(config.get(n, True)) is not bool}
    wrong |= {"metadata": config["metadata"]} if not isinstance(config.get("metadata", {}), dict) else {}
    k, kind = config.get("k"), str(config["architecture"])
    numbers = (int,) if kind == "topk" else (int, float)  # a BatchTopK's is a mean
    if "topk" in kind and not wrong and not (type(k) in numbers and 0 < cast(float, k) <= config["d_sae"]):
        wrong["k"] = k
    return wrong


def checked(sae: SAE[Any], where: str) -> SAE[Any]:
    """The same SAE. Raises ValueError for weights that are not finite or have other shapes than its configuration says."""
    d_in, d_sae = sae.cfg.d_in, sae.cfg.d_sae
    expected = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "threshold": (d_sae,), "W_dec": (d_sae, None), "b_dec": (None,)}
    for name, tensor in sae.state_dict().items():
        shape = expected.get(name)
        fits = shape is None or (len(shape) == tensor.dim() and all(n in (None, size) for n, size in zip(shape, tensor.shape, strict=True)))
        if not fits or not torch.isfinite(tensor).all():
            got = f"the shape {tuple(tensor.shape)}" if not fits else "NaN or infinity"
            raise ValueError(f"{where}: expected finite weights of d_in {d_in} and d_sae {d_sae}, got {got} in {name}")
    return sae


def _site_in(folder: Path) -> str | None:
    """The site of the SAE that lies in the folder itself."""
    config = folder / "cfg.json"
    found = files.read_json(config) if config.is_file() else {}
    about = found.get("metadata") if isinstance(found, dict) else None
    return about.get("hook_name") if isinstance(about, dict) else None


def site_of(sae: SAE[Any]) -> str:
    """The hook name that the SAE was trained at. Raises ValueError where the SAE does not say."""
    site, written = sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out
    if written and written != site:
        raise ValueError(
            f"this is a transcoder: it reads at {site} and writes at {written}, so its latents have no one site to diff, steer or "
            "block at. Take an SAE of the residual stream; to look at a transcoder's latents, encode what read_sites gives"
        )
    if not site:
        raise ValueError("this SAE names no site: set sae.cfg.metadata.hook_name to the TransformerLens hook name it was trained at")
    return site


def described(sae: SAE[Any]) -> dict[str, Any]:
    """For cards: the SAE's kind, what is folded into its weights and what it does to its inputs, and its page on Neuronpedia."""
    settings = sae.cfg.to_dict()
    return {"sae": {name: settings[name] for name in _KIND if name in settings}, "neuronpedia": sae.cfg.metadata.neuronpedia_id}


def check_fits(sae: SAE[Any], model: HasHookPoints) -> str:
    """The SAE's site, after checking that the model has it and that widths and units agree, and that the weights are finite.

    Raises:
        ValueError: where they do not.
    """
    checked(sae, "this SAE")
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
