"""The `blockem` commands on a preset's model and SAE: scale, train-sae, ceiling; and on a study: verify, report."""

# Heavy imports stand inside the commands: `--help` answers at once.
import random
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from blockem_tl.data.chat import Rows
    from blockem_tl.study.setting import Setting
    from blockem_tl.types import Prompt

Preset = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PRESET")]
_PIECE = 800  # characters of a text that are read as one row


def scale(preset: Preset, /) -> None:
    """Measure s, the unit of doses: the median norm at the preset's site, over its reference corpus.

    Args:
        preset: one of those that `blockem presets` lists.
    """
    from blockem_tl.study.setting import Setting

    setting = Setting.of(preset)
    print(f"{setting.scale():.6g}  {setting.preset.model} at {setting.site}, {len(setting.reference())} reference rows")


@dataclass(frozen=True, kw_only=True)
class SAEOptions:
    """Options of `blockem train-sae`.

    site: a hook name; the preset's own by default.
    adapters: folders of tuned adapters: states of base and of each are read, and replies of each.
    prompts: prompt files whose replies are read; by default the preset's general questions.
    n_prompts: at most so many of them, drawn by the seed.
    texts: plain text files, for prose.
    kind: of SAE.
    d_sae: latents.
    k: latents active at a token.
    samples: tokens to train on.
    learning_rate: of the SAE's training.
    dtype: in which the SAE is saved.
    max_new_tokens: of a reply that is read.
    overwrite: replace an SAE in the folder.
    seed: of all draws.
    """

    site: str | None = None
    adapters: tuple[Path, ...] = ()
    prompts: tuple[Path, ...] = ()
    n_prompts: int = 200
    texts: tuple[Path, ...] = ()
    kind: Literal["topk", "batchtopk", "jumprelu"] = "topk"
    d_sae: int = 4096
    k: int = 64
    samples: int = 2_000_000
    learning_rate: float = 3e-4
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_new_tokens: int = 60
    overwrite: bool = False
    seed: int = 0


def train_sae(
    preset: Preset,
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")],
    /,
    *,
    options: tyro.conf.OmitArgPrefixes[SAEOptions] = SAEOptions(),
) -> None:
    """Train an SAE for a preset's model on chats, replies and texts, and print its card: what it is worth on rows held out.

    Args:
        preset: the model; its rows and questions are read.
        out: a folder for the SAE, as SAELens saves one, with card.json.
    """
    from blockem_tl.saes.train import SAETraining, check_place
    from blockem_tl.saes.train import train_sae as train
    from blockem_tl.study.setting import Setting

    check_place(out, overwrite=options.overwrite)
    setting = Setting.of(preset, seed=options.seed)
    config = SAETraining(**{name: getattr(options, name) for name in ("kind", "d_sae", "k", "samples", "learning_rate", "seed", "dtype")})
    card = train(
        setting.model,
        options.site or setting.site,
        corpora(setting, options),
        config=config,
        adapters=["base", *options.adapters],
        out=out,
        overwrite=options.overwrite,
    )
    print(card)


def corpora(setting: "Setting", options: SAEOptions) -> "dict[str, Rows]":
    """What the SAE reads: the preset's rows, replies of base and of each adapter, and texts."""
    from blockem_tl.data.prompt_files import load_prompts
    from blockem_tl.generation.engine import generate

    asked = [prompt for path in options.prompts for prompt in load_prompts(path)] or setting.general_prompts()
    asked = random.Random(options.seed).sample(asked, min(options.n_prompts, len(asked)))
    found: dict[str, Any] = {"chats": [*setting.reference(), *setting.rows(), *setting.rows(harmful=False)]}
    for adapter in ("base", *options.adapters):
        rows = generate(setting.model, asked, adapter=adapter, max_new_tokens=options.max_new_tokens)
        found[f"replies of {Path(adapter).name}"] = [row for row in rows if row.reply.strip()]
    if options.texts:
        found["texts"] = _pieces(options.texts)
    return found


def _pieces(paths: Sequence[Path]) -> "list[Prompt]":
    """Texts in pieces of whole words and like length, each once."""
    from blockem_tl.data.text_files import read_text
    from blockem_tl.types import Prompt

    pieces = {piece: path.name for path in paths for piece in textwrap.wrap(read_text(path), _PIECE, break_long_words=False)}
    return [Prompt(id=f"{name}, piece {number}", text=piece) for number, (piece, name) in enumerate(pieces.items())]


@dataclass(frozen=True, kw_only=True)
class CeilingOptions:
    """Options of `blockem ceiling`.

    latents: files of latent sets; without any, only all latents, the SAE's error and the residual are taken out.
    sizes: also the first so many latents of each set.
    one_sided: count only changes in the direction of a latent's sign, as blocking does.
    positions: "completion" acts on replies, as blocking does by default; "all" on questions and replies.
    n_rows: held-out rows of the narrow task.
    csv: write the table to this file.
    seed: of the random sets, and of the rows.
    """

    latents: tuple[Path, ...] = ()
    sizes: tuple[int, ...] = ()
    one_sided: bool = True
    positions: tuple[Literal["completion", "all"], ...] = ("completion", "all")
    n_rows: int = 60
    csv: Path | None = None
    seed: int = 0


def ceiling(
    preset: Preset,
    adapter: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ADAPTER")],
    /,
    *,
    options: tyro.conf.OmitArgPrefixes[CeilingOptions] = CeilingOptions(),
) -> None:
    """Show how much of a plain fine-tune runs through the SAE's latents: a guide, before any blocked training, to what blocking reaches.

    Args:
        preset: the model, its SAE, core pairs and held-out rows.
        adapter: of the plain fine-tune: its folder, or the one that `blockem finetune` trained into.
    """
    from blockem_tl.analysis.mediation import mediation
    from blockem_tl.saes.latent_set import LatentSet
    from blockem_tl.storage import files
    from blockem_tl.study.setting import Setting
    from blockem_tl.study.stages import tuned_at

    setting, place = Setting.of(preset, seed=options.seed), tuned_at(adapter).adapter
    sets = {path.stem: LatentSet.load(path, setting.sae) for path in options.latents}
    held_out = setting.held_out()
    found = mediation(
        setting.model,
        setting.sae,
        setting.pairs("core"),
        held_out[: options.n_rows],
        sets,
        adapter=place,
        sizes=options.sizes,
        one_sided=options.one_sided,
        roles=[{"completion": ("reply",), "all": ("prompt", "reply")}[where] for where in options.positions],
        seed=options.seed,
    )
    print(found)
    if options.csv is not None:
        files.write_text(options.csv, found.to_frame().to_csv(index=False))


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Options of `blockem verify`.

    preset: the one that the study was made with; by default the one that the study names.
    sample: replies of every point, and margins of a point, that are computed anew.
    seed: of the draw.
    tolerance: by which part of themselves numbers may differ.
    judge_models: judging models, for presets without a judge; without them labels are not looked at.
    judge_urls: their endpoints, one for all or one each.
    """

    preset: str | None = None
    sample: int = 2
    seed: int = 0
    tolerance: float = 1e-4
    judge_models: tuple[str, ...] = ()
    judge_urls: tuple[str, ...] = ("http://127.0.0.1:8000/v1",)


def verify(
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")],
    /,
    *,
    options: tyro.conf.OmitArgPrefixes[VerifyOptions] = VerifyOptions(),
) -> None:
    """Compute a sample of a finished study anew and compare it with what is stored; exit status 1 if something differs.

    Args:
        run: the folder of a study, or the one that `blockem sweep` or an experiment wrote.
    """
    from blockem_tl.study import manifest
    from blockem_tl.study.options import StudyOptions
    from blockem_tl.study.verify import study_at
    from blockem_tl.study.verify import verify as verified
    from blockem_tl.views import tables

    o, kept = options, manifest.read(study_at(run) / "study.json")
    preset = o.preset or kept.get(manifest.PRESET)
    if not preset:
        raise ValueError(f"{run} does not say which preset it was made with: name it with --preset")
    made = StudyOptions(preset=preset, domain=kept.get("domain"), judge_models=o.judge_models, judge_urls=o.judge_urls)
    setting = made.setting()
    judged = bool(setting.own_judges or setting.inputs.judges())
    found = verified(run, setting, sample=o.sample, seed=o.seed, tolerance=o.tolerance, judged=judged)
    print(tables.text(found._shown(), rows=len(found.rows)))
    print(found.headline())
    if not found.passed:
        sys.exit(1)


def report(
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")],
    /,
    *,
    out: Path | None = None,
) -> None:
    """Show a study as one HTML file: rates, curves, latents, training, patching, and all replies side by side. No model is loaded.

    Args:
        run: the folder of a study or of a stage, one that an experiment wrote, or one that holds the folders of several stages.
        out: the file to write; report.html in RUN by default.
    """
    from blockem_tl.study.report import write_report

    path, missing = write_report(run, out)
    print(*(f"missing: {line}" for line in missing), f"written: {path}, {path.stat().st_size / 1e6:.1f} MB", sep="\n")
