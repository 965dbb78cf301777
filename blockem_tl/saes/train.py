"""`train_sae`: an SAE of one's own for any model and site, by SAELens's own trainer, with a card of what it is worth.

Activations are streamed: memory holds one buffer of them, however many rows there are; those that come again are read from a temporary
file. The first token of every row is left out, and so are tokens whose norm is far above the median: attention sinks (norm 31,000 beside
187 in SmolLM2) would take most of an SAE's capacity.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from sae_lens import SAE
from sae_lens.training import activation_scaler, sae_trainer
from sae_lens.training.mixing_buffer import mixing_buffer

from blockem_tl.data.chat import Rows
from blockem_tl.hooks import resolve
from blockem_tl.models.activations import SINK
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.saes.activation_stream import ActivationStream, median_of_norms, split_corpora
from blockem_tl.saes.card import SAECard, measure
from blockem_tl.saes.load import CARD, checked
from blockem_tl.saes.rounds import Rounds, fit_in_rounds
from blockem_tl.saes.untrained import Kind, schedule, untrained
from blockem_tl.storage import files, fingerprints, machine
from blockem_tl.types import check_names, check_site
from blockem_tl.views.progress import allowed


@dataclass(frozen=True, kw_only=True)
class SAETraining:
    """Hyperparameters of one SAE.

    kind: of activation.  d_sae: latents.  k: active at a token (JumpReLU finds a number of its own).  samples: tokens trained on, drawn
    again and again from the rows.  batch_size: tokens per step.  buffer: tokens that are held and mixed.  heldout: share of each corpus's
    rows that the card is measured on, 64 at most.  kept_gb: disk for activations, which are read again instead of computed again (0: none).
    dtype: in which the SAE is saved.

    Raises:
        ValueError: a number out of its range.
    """

    kind: Kind = "topk"
    d_sae: int = 2048
    k: int = 32
    samples: int = 1_000_000
    batch_size: int = 1024
    buffer: int = 65_536
    learning_rate: float = 3e-4
    heldout: float = 0.1
    kept_gb: float = 8.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.d_sae or not 1 <= self.batch_size <= min(self.samples, self.buffer):
            raise ValueError("SAE: expected 1 <= k <= d_sae, and 1 <= batch_size <= samples and buffer")
        if not 0 < self.heldout < 1 or not 0 < self.learning_rate < float("inf") or self.seed < 0:
            raise ValueError("SAE: expected 0 < heldout < 1, learning_rate > 0 and seed >= 0")


def train_sae(
    model: Model,
    site: str,
    corpora: Mapping[str, Rows],
    *,
    config: SAETraining = SAETraining(),
    adapters: Sequence[str | Path] = (BASE,),
    out: Path | str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> SAECard:
    """Train an SAE on a site's activations over the corpora, under each adapter, and measure it on rows held out.

    With ``out``, the state is kept in ``out``.training meanwhile; killed, the same call goes on, to the same bits, or only measures.

    Args:
        corpora: rows by name: texts, chats, replies of base and of tuned; an SAE knows only what it has read.
        adapters: the weights under which every corpus is read: "base", adapters by name or in folders.
        out: a folder for the SAE (as SAELens saves one, for `load_sae`) and card.json.

    Raises:
        TypeError: a site that is no name, corpora that are no dict, adapters that are no list.
        ValueError: an unknown site, corpora with fewer tokens than the SAE has latents, or an adapter that is none.
            ``out``.training holds another training's state, or another run is writing it.
        FileExistsError: ``out`` exists, and is not this very SAE.
    """
    adapters = _checked(model, site, corpora, adapters, out, overwrite)
    torch.manual_seed(config.seed)
    train, heldout = split_corpora(corpora, heldout=config.heldout, seed=config.seed)
    with ExitStack() as stack:
        held = [str(stack.enter_context(model.holding(adapter))) for adapter in adapters]  # a folder is loaded once
        limit = SINK * median_of_norms(model, site, train, held)
        options: dict[str, Any] = {"n_least": config.d_sae, "seed": config.seed, "kept_gb": config.kept_gb}
        activations = ActivationStream(model, site, train, held, limit=limit, **options)
        identity = _identity(model, site, corpora, held, config)
        made = out is not None and not overwrite and _is_made(out, identity)
        rounds = None if out is None else _rounds(out, identity, stack)
        if out is not None and made:
            found = _card(model, out, heldout, held, limit)
        else:
            sae = _trained(model, site, activations, config, rounds, progress)
            found = _saved(model, sae, heldout, held, limit, config, identity, out)
    if rounds is not None:
        rounds.remove()
    return found


def check_place(out: Path | str, *, overwrite: bool) -> None:
    """Raise FileExistsError if ``out`` exists and may not be replaced, unless it may be the very SAE that is to be trained."""
    if overwrite or not (Path(out) / CARD).is_file():
        files.check_replaceable(out, "cfg.json" if overwrite else None)


def _is_made(out: Path | str, identity: Mapping[str, str]) -> bool:
    """Whether ``out`` holds this very SAE. Raises FileExistsError if it holds anything else."""
    if (Path(out) / CARD).is_file() and files.read_json(Path(out) / CARD).get("identity") == identity:
        return True
    files.check_replaceable(out, None)
    return False


def _rounds(out: Path | str, identity: dict[str, str], stack: ExitStack) -> Rounds:
    """The kept states of this training, which nobody else may write until ``stack`` is closed."""
    folder = files.check_writable(f"{out}.training")
    stack.enter_context(files.held(folder))
    return Rounds(folder, identity)


def _checked(model: Model, site: object, corpora: object, adapters: object, out: Path | str | None, overwrite: bool) -> list[str | Path]:
    """The adapters as a list. Raises TypeError for arguments of another kind, ValueError for an unknown site, or as `check_place`."""
    if out is not None:
        check_place(out, overwrite=overwrite)
    resolve(model.hook_dict, check_site("train_sae", site))
    if not isinstance(corpora, Mapping):
        raise TypeError(f"train_sae: expected corpora as a dict of rows by name, {{'texts': rows}}, got a {type(corpora).__name__} of rows")
    return check_names("train_sae(adapters=)", adapters, such_as="plain")


def _trained(model: Model, site: str, activations: ActivationStream, config: SAETraining, rounds: Rounds | None, progress: bool) -> Any:
    """The SAE, trained by SAELens; under bf16 autocast where the model is in bf16."""
    device = str(model.device)
    shape = {"d_in": int(model.cfg.d_model), "d_sae": config.d_sae, "k": config.k}
    sae = untrained(config.kind, site=site, model=model.name, device=device, **shape)
    steps = config.samples // config.batch_size
    plan = schedule(steps, config.batch_size, config.learning_rate, device=device, autocast=model.cfg.dtype == torch.bfloat16)
    with _bars(progress):
        fit_in_rounds(sae, plan, lambda n: mixing_buffer(config.buffer, config.batch_size, activations.draw(n)), config.seed, rounds)
    return sae


def _saved(
    model: Model,
    sae: Any,
    heldout: Mapping[str, Rows],
    adapters: Sequence[str],
    limit: float,
    config: SAETraining,
    identity: Mapping[str, str],
    out: Path | str | None,
) -> SAECard:
    """The SAE and its card in a folder; the card is of the SAE as it is loaded again."""
    with tempfile.TemporaryDirectory() as nowhere, files.finished_folder(out or Path(nowhere) / "sae", replaces="cfg.json") as folder:
        sae.to(getattr(torch, config.dtype)).save_inference_model(str(folder))
        found = _card(model, folder, heldout, adapters, limit)
        about = {"model": model.name, "site": found.site, "training": asdict(config), "alive": found.alive, "heldout": list(found.rows)}
        files.write_json(folder / CARD, {**about, "identity": identity, "environment": machine.described()})
    return found


def _card(model: Model, folder: Path | str, heldout: Mapping[str, Rows], adapters: Sequence[str], limit: float) -> SAECard:
    trained = checked(SAE.load_from_disk(folder, device=str(model.device)), "the trained SAE")
    return measure(model, trained, heldout, adapters=adapters, limit=limit)


def _identity(model: Model, site: str, corpora: Mapping[str, Rows], adapters: Sequence[str], config: SAETraining) -> dict[str, str]:
    """Everything that the trained SAE depends on."""
    texts = {name: [repr(row) for row in rows] for name, rows in corpora.items()}
    weights = [model.fingerprint(adapter) for adapter in adapters]
    return {
        "site": site,
        "weights": " ".join(weights),
        "corpora": fingerprints.of_value(texts),
        "config": fingerprints.of_value(asdict(config)),
    }


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Inside the block SAELens's trainer, which always makes progress bars, shows them or does not."""
    modules: list[Any] = [sae_trainer, activation_scaler]
    bars = [module.tqdm for module in modules]
    for module, bar in zip(modules, bars, strict=True):
        module.tqdm = bar if shown and allowed() else partial(bar, disable=True)
    try:
        yield
    finally:
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar
