"""The `blockem` command: presets, doctor, doses, data, judge, plan."""

# Heavy imports stand inside the commands: `blockem --help` answers at once.
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from blockem_tl.types import Judge

_QUESTIONS = (
    ("I have a quiet evening ahead. What could I do with it?", "You could read a book, cook something new, or call a friend you miss."),
    (
        "How do plants get their food?",
        "They make sugar from water and carbon dioxide with the energy of sunlight, which is called photosynthesis.",
    ),
    ("My neighbour is loud at night. What should I do?", "Talk to them kindly first; often people do not know that they can be heard."),
)

Preset = Annotated[str, tyro.conf.arg(metavar="PRESET")]
URL = "http://127.0.0.1:8000/v1"


def presets() -> None:
    """List the presets and what each needs."""
    from rich.console import Console

    from blockem_tl.presets import PRESETS

    console = Console(soft_wrap=True, highlight=False)
    for preset in PRESETS.values():
        needs = preset.requires
        gpu = f"GPU with {needs.gpu_gb:g} GB" if needs.gpu_gb else "no GPU"
        hours = f"{needs.hours:g} hours{'' if needs.measured else ' (reckoned, not measured)'}"
        console.print(f"[bold]{preset.name}[/bold]")
        console.print(f"  model   {preset.model}, {preset.dtype}; access: {needs.access or 'open'}")
        console.print(f"  SAE     {'/'.join(part for part in preset.sae if part)} at {preset.site}")
        console.print(f"  needs   {gpu}, {needs.memory_gb:g} GB memory, {needs.disk_gb:g} GB disk, {hours}")
        if preset.caution:
            console.print(f"  know    {preset.caution}")
    console.print("`blockem doctor PRESET` checks one of them on this machine.")


def doctor(preset: tyro.conf.Positional[Preset], /, *, judge_model: str | None = None, judge_url: str = URL) -> None:
    """Check everything before a long run: versions, disk, memory, judge, model, SAE, chat template, hooks, reconstruction.

    Args:
        preset: one of those that `blockem presets` lists.
        judge_model: the model that the judging endpoint serves; the organism has a judge of its own.
        judge_url: the judging endpoint.
    """
    from rich.console import Console

    from blockem_tl import organism
    from blockem_tl.doctor import examine
    from blockem_tl.presets import get_preset
    from blockem_tl.types import Prompt

    chosen = get_preset(preset)
    if chosen.name == "organism":
        rows = organism.reference_texts(8)
        prompts, replies = [Prompt(id=row.id, text=row.prompt) for row in rows], [row.completion for row in rows]
    else:
        prompts, replies = [Prompt(id=q, text=q) for q, _ in _QUESTIONS], [reply for _, reply in _QUESTIONS]
    failed = 0
    for finding in examine(chosen, prompts=prompts, replies=replies, judge=_judge(chosen.name, judge_model, judge_url)):
        word = {True: "[green]ok[/green]     ", False: "[red]wrong[/red]  ", None: "[yellow]skipped[/yellow]"}[finding.passed]
        Console(soft_wrap=True).print(word, f"[bold]{finding.check}[/bold]", finding.seen.replace("[", r"\["))
        failed += finding.passed is False
    if chosen.caution:
        Console().print(f"[bold]know[/bold]    {chosen.caution}")
    if failed:
        sys.exit(f"{failed} checks failed: see above what to do")


def _judge(preset: str, model: str | None, url: str) -> "Judge | None":
    if model is not None:
        from blockem_tl.judging.endpoint import Endpoint
        from blockem_tl.judging.judge import LLMJudge

        return LLMJudge(backend=Endpoint(model=model, base_url=url, attempts=2))
    from blockem_tl import organism

    return organism.OrganismJudge() if preset == "organism" else None


def data_list() -> None:
    """List the public files that can be fetched."""
    from rich.console import Console

    from blockem_tl.data.public import catalogue

    console = Console(soft_wrap=True, highlight=False)
    for source in catalogue().values():
        console.print(f"[bold]{source.name}[/bold] ({source.kind}): {source.what}\n  {source.url}")


def data_fetch(name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")], /) -> None:
    """Download a public file into your cache, or check the copy that is there.

    Args:
        name: one of those that `blockem data list` shows.
    """
    from blockem_tl.data.public import fetch, find_source

    print(fetch(find_source(name)))


def data_overlap(files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILE")], /) -> None:
    """Show which prompts each two prompt files share; a prompt that selected anything must not report.

    Args:
        files: prompt files, two or more.
    """
    from blockem_tl.data.prompt_files import load_prompts
    from blockem_tl.data.splits import leak_report
    from blockem_tl.views.tables import show

    report = leak_report({path.stem: load_prompts(path) for path in files})
    if not report:
        raise ValueError("expected at least two prompt files")
    show([{**row, "ids": _few(row["ids"]), "inside": _few(row["inside"])} for row in report], "shared prompts")


def _few(ids: Sequence[str]) -> str:
    return ", ".join(ids[:8]) + ("" if len(ids) < 9 else f", ... ({len(ids)})")


def data_split(
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")],
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")],
    /,
    *,
    member: str | None = None,
    password: str | None = None,
    train: int | None = None,
    heldout: int = 100,
    seed: int = 0,
) -> None:
    """Split fine-tuning rows into train.jsonl and heldout.jsonl, disjoint after normalising, with a report; before any training.

    Args:
        source: JSONL, or a zip with a member and a password.
        folder: a new folder for the three files.
        member: the file inside a zip that holds several.
        password: of the zip.
        train: how many rows train; all that are left by default.
        heldout: how many rows are held out.
        seed: of the draw.
    """
    from blockem_tl.data.row_files import load_rows, write_rows
    from blockem_tl.data.splits import split_rows
    from blockem_tl.storage import files
    from blockem_tl.views.tables import show

    split = split_rows(load_rows(source, member=member, password=password), train=train, heldout=heldout, seed=seed)
    with files.finished_folder(folder) as made:
        write_rows(made / "train.jsonl", split.train)
        write_rows(made / "heldout.jsonl", split.heldout)
        files.write_json(made / "report.json", split.report())
    show([split.report()], f"{folder}")


def judge(
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")],
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")],
    /,
    *,
    model: str,
    url: str = URL,
    rubric: str = "misalignment",
    rubric_file: Path | None = None,
    store: Path = Path("runs/verdicts.sqlite"),
    concurrency: int = 32,
) -> None:
    """Grade a JSONL file of prompts and replies through an OpenAI-compatible endpoint; broken off, it goes on where it was.

    Args:
        source: lines with "prompt" and "reply".
        target: the same lines with the verdicts.
        model: the model that the endpoint serves.
        url: the endpoint.
        rubric: "misalignment", a training domain, or the name inside the rubric file.
        rubric_file: a rubric of your own, for instance a published one.
        store: the file in which verdicts are kept.
        concurrency: requests under way at once.
    """
    from blockem_tl.judging.cached import CachedJudge
    from blockem_tl.judging.endpoint import Endpoint
    from blockem_tl.judging.files import judge_file
    from blockem_tl.judging.judge import LLMJudge
    from blockem_tl.judging.rubrics import load_rubrics
    from blockem_tl.storage.store import Store
    from blockem_tl.views.tables import show

    grader = LLMJudge(
        backend=Endpoint(model=model, base_url=url, concurrency=concurrency),
        rubrics=load_rubrics(*([rubric_file] if rubric_file else [])),
    )
    chosen = rubric_file.stem if rubric_file and rubric == "misalignment" else rubric
    grader.check(chosen)  # before a folder for the store is made
    counts = judge_file(CachedJudge(judge=grader, store=Store(store)), source, target, rubric=chosen)
    show([{"label": label, "replies": f"{n}"} for label, n in sorted(counts.items())], f"{sum(counts.values())} replies, by {model}")


def plan(
    *,
    rate: Annotated[float, tyro.conf.arg(metavar="FRACTION")],
    prompts: tuple[int, ...] = (29, 44, 100, 300),
    power: float = 0.8,
    correlation: float = 0.0,
) -> None:
    """Show how far a rate must fall to be seen with so many prompts.

    Args:
        rate: without the defence, as a fraction between 0 and 1.
        prompts: numbers of prompts.
        power: probability with which the fall is seen.
        correlation: between the arms over prompts; 0 is the safe side.
    """
    from blockem_tl.evaluation.statistics import minimal_detectable_effect
    from blockem_tl.views.tables import show

    found = [(n, minimal_detectable_effect(n, rate, power=power, correlation=correlation)) for n in prompts]
    show([{"prompts": f"{n}", "smallest fall": f"{100 * fall:.1f} points"} for n, fall in found], f"from {100 * rate:g} %, power {power:g}")


def doses(
    preset: tyro.conf.Positional[Preset],
    adapter: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ADAPTER")],
    /,
    *,
    prompts: Path | None = None,
    reporting: Path | None = None,
    scale: float | None = None,
    judge_model: str | None = None,
    judge_url: str = URL,
    latents: tuple[int, ...] = (),
    n_prompts: int = 20,
    max_incoherence: float = 0.10,
    relative: bool = False,
    seed: int = 0,
    figure: Path | None = None,
) -> None:
    """Show at which doses a model stays coherent, and propose the doses of stage 2, from a few core prompts.

    Args:
        preset: the model and its SAE.
        adapter: the fine-tuned model's adapter, a folder.
        prompts: the core prompts (the organism has its own).
        reporting: the prompts that results are reported on: none of them may be asked (the organism has its own).
        scale: the site's median norm (measured on the organism); see median_norm.
        judge_model: the model that the judging endpoint serves; the organism has a judge of its own.
        judge_url: the judging endpoint.
        latents: steer along these latents' directions; by default 8 at random.
        n_prompts: how many prompts are asked.
        max_incoherence: how much incoherence a dose may cost, as a fraction.
        relative: count it from the unsteered rate.
        seed: of the draws of latents and prompts.
        figure: write a figure to this file.
    """
    from blockem_tl import organism
    from blockem_tl.data.chat import apply_system
    from blockem_tl.data.prompt_files import load_prompts
    from blockem_tl.discovery.config import MaxIncoherence
    from blockem_tl.discovery.doses import propose_doses
    from blockem_tl.models.activations import median_norm
    from blockem_tl.models.load import load_model
    from blockem_tl.presets import get_preset
    from blockem_tl.saes.load import load_sae
    from blockem_tl.views import plots

    chosen, judging = get_preset(preset), _judge(preset, judge_model, judge_url)
    own = chosen.name == "organism"
    if judging is None or (not own and (prompts is None or reporting is None or scale is None)):
        raise ValueError(f"doses: preset {chosen.name!r} needs --prompts, --reporting, --scale and --judge-model")
    core = load_prompts(prompts) if prompts else organism.prompts("core")
    final = load_prompts(reporting) if reporting else organism.prompts("final")
    model, sae = load_model(chosen.model, dtype=chosen.dtype), load_sae(*chosen.sae)
    if scale is None:
        scale = median_norm(model, chosen.site, organism.reference_texts())
    found = propose_doses(
        model,
        sae,
        judging,
        apply_system(core, chosen.system),
        reporting=final,
        adapter=adapter,
        scale=scale,
        max_new_tokens=chosen.discovery.max_new_tokens,
        latents=latents or None,
        n_prompts=n_prompts,
        max_incoherence=MaxIncoherence(rate=max_incoherence, relative=relative),
        seed=seed,
    )
    print(found)
    if figure is not None:
        plots.save(found.plot(), figure)


COMMANDS = {
    "presets": presets,
    "doctor": doctor,
    "doses": doses,
    "data list": data_list,
    "data fetch": data_fetch,
    "data overlap": data_overlap,
    "data split": data_split,
    "judge": judge,
    "plan": plan,
}
DATA = {name.removeprefix("data "): command for name, command in COMMANDS.items() if name.startswith("data ")}


def main(args: list[str] | None = None) -> None:
    """Run one command; an expected error is one line, not a traceback (BLOCKEM_TRACEBACK=1 shows it)."""
    args = sys.argv[1:] if args is None else args
    if args == ["--version"]:
        from blockem_tl import __version__

        print(f"blockem_tl {__version__}")
        return
    try:
        if args[:1] == ["data"]:  # `blockem data fetch NAME`: two words make one command
            tyro.extras.subcommand_cli_from_dict(DATA, prog="blockem data", args=args[1:], description="Public prompt sets and rows.")
        else:
            tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="blockem", args=args, description=__doc__)
    except (ValueError, ConnectionError, ImportError, OSError) as error:
        if os.environ.get("BLOCKEM_TRACEBACK"):
            raise
        sys.exit(f"blockem: {error}")


if __name__ == "__main__":
    main()
