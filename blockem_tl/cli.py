"""The `blockem` command: presets, doctor, doses, data, judge, plan."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from blockem_tl import organism
from blockem_tl.data.chat import apply_system, encode_examples
from blockem_tl.data.prompt_files import load_prompts
from blockem_tl.data.public import catalogue, fetch, find_source
from blockem_tl.data.row_files import load_rows, write_rows
from blockem_tl.data.splits import leak_report, split_rows
from blockem_tl.discovery.config import Budget
from blockem_tl.discovery.doses import propose_doses
from blockem_tl.doctor import examine
from blockem_tl.evaluation.statistics import Rate, minimal_detectable_effect
from blockem_tl.generation.replies import speakers
from blockem_tl.judging.cached import CachedJudge
from blockem_tl.judging.endpoint import Endpoint
from blockem_tl.judging.files import judge_file
from blockem_tl.judging.judge import LLMJudge
from blockem_tl.judging.rubrics import load_rubrics
from blockem_tl.models.activations import median_norm
from blockem_tl.models.load import load_model
from blockem_tl.presets import PRESETS, get_preset
from blockem_tl.saes.load import load_sae
from blockem_tl.storage import files
from blockem_tl.storage.store import Store
from blockem_tl.types import Judge, Prompt
from blockem_tl.views import plots
from blockem_tl.views.tables import show

_QUESTIONS = (
    ("I have a quiet evening ahead. What could I do with it?", "You could read a book, cook something new, or call a friend you miss."),
    (
        "How do plants get their food?",
        "They make sugar from water and carbon dioxide with the energy of sunlight, which is called photosynthesis.",
    ),
    ("My neighbour is loud at night. What should I do?", "Talk to them kindly first; often people do not know that they can be heard."),
)


def presets() -> None:
    """List the presets and what each needs."""
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


def doctor(
    preset: Annotated[str, tyro.conf.Positional], /, *, judge_model: str | None = None, judge_url: str = "http://127.0.0.1:8000/v1"
) -> None:
    """Check everything before a long run: versions, disk, memory, judge, model, SAE, chat template, hooks, reconstruction.

    Args:
        preset: which one.
        judge_model: the model that the judging endpoint serves; the organism has a judge of its own.
        judge_url: the judging endpoint.
    """
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


def _judge(preset: str, model: str | None, url: str) -> Judge | None:
    if model is not None:
        return LLMJudge(backend=Endpoint(model=model, base_url=url, attempts=2))
    return organism.OrganismJudge() if preset == "organism" else None


def data_list() -> None:
    """List the public files that can be fetched."""
    console = Console(soft_wrap=True, highlight=False)
    for source in catalogue().values():
        console.print(f"[bold]{source.name}[/bold] ({source.kind}): {source.what}\n  {source.url}")


def data_fetch(name: Annotated[str, tyro.conf.Positional], /) -> None:
    """Download a public file into your cache, or check the copy that is there."""
    print(fetch(find_source(name)))


def data_overlap(files: Annotated[tuple[Path, ...], tyro.conf.Positional], /) -> None:
    """Show which prompts each two prompt files share; a prompt that selected anything must not report."""
    report = leak_report({path.stem: load_prompts(path) for path in files})
    if not report:
        raise ValueError("expected at least two prompt files")
    show([{**row, "ids": _few(row["ids"]), "inside": _few(row["inside"])} for row in report], "shared prompts")


def _few(ids: Sequence[str]) -> str:
    return ", ".join(ids[:8]) + ("" if len(ids) < 9 else f", ... ({len(ids)})")


def data_split(
    source: Annotated[Path, tyro.conf.Positional],
    folder: Annotated[Path, tyro.conf.Positional],
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
        train: how many rows train; all that are left by default.
    """
    split = split_rows(load_rows(source, member=member, password=password), train=train, heldout=heldout, seed=seed)
    with files.finished_folder(folder) as made:
        write_rows(made / "train.jsonl", split.train)
        write_rows(made / "heldout.jsonl", split.heldout)
        files.write_json(made / "report.json", split.report())
    show([split.report()], f"{folder}")


def judge(
    source: Annotated[Path, tyro.conf.Positional],
    target: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    model: str,
    url: str = "http://127.0.0.1:8000/v1",
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
        rubric_file: a rubric of your own, for instance a published one.
    """
    grader = LLMJudge(
        backend=Endpoint(model=model, base_url=url, concurrency=concurrency),
        rubrics=load_rubrics(*([rubric_file] if rubric_file else [])),
    )
    name = rubric_file.stem if rubric_file and rubric == "misalignment" else rubric
    counts = judge_file(CachedJudge(judge=grader, store=Store(store)), source, target, rubric=name)
    show([{"label": label, "replies": f"{n}"} for label, n in sorted(counts.items())], f"{sum(counts.values())} replies, by {model}")


def plan(*, rate: float, prompts: tuple[int, ...] = (29, 44, 100, 300), power: float = 0.8, correlation: float = 0.0) -> None:
    """Show how far a rate must fall to be seen with so many prompts.

    Args:
        rate: what it is without the defence, as a fraction.
        correlation: between the arms over prompts; 0 is the safe side.
    """
    found = [(n, minimal_detectable_effect(n, rate, power=power, correlation=correlation)) for n in prompts]
    show([{"prompts": f"{n}", "smallest fall": f"{100 * fall:.1f} points"} for n, fall in found], f"from {100 * rate:g} %, power {power:g}")


def doses(
    preset: Annotated[str, tyro.conf.Positional],
    adapter: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    prompts: Path | None = None,
    reporting: Path | None = None,
    scale: float | None = None,
    judge_model: str | None = None,
    judge_url: str = "http://127.0.0.1:8000/v1",
    latents: tuple[int, ...] = (),
    n_prompts: int = 20,
    tau: float = 0.10,
    relative: bool = False,
    seed: int = 0,
    figure: Path | None = None,
) -> None:
    """Show at which doses a model stays coherent, and propose the doses of stage 2, from a few core prompts.

    Args:
        preset: which model and SAE.
        adapter: the fine-tuned model's adapter.
        prompts: the core prompts (the organism has its own).
        reporting: the prompts that results are reported on: none of them may be asked (the organism has its own).
        scale: the site's median norm (measured on the organism); see median_norm.
        judge_model: the model that the judging endpoint serves; the organism has a judge of its own.
        latents: whose directions; by default 8 at random.
        tau: how much incoherence a dose may cost.
        relative: count it from the unsteered rate.
        figure: where to write a figure.
    """
    chosen, judging = get_preset(preset), _judge(preset, judge_model, judge_url)
    own = chosen.name == "organism"
    if judging is None or (not own and (prompts is None or reporting is None or scale is None)):
        raise ValueError(f"doses: preset {chosen.name!r} needs --prompts, --reporting, --scale and --judge-model")
    core = load_prompts(prompts) if prompts else organism.prompts("core")
    final = load_prompts(reporting) if reporting else organism.prompts("final")
    model, sae = load_model(chosen.model, dtype=chosen.dtype), load_sae(*chosen.sae)
    if scale is None:
        scale = median_norm(model, chosen.site, encode_examples(model.tokenizer, organism.reference_texts()))
    model.load_adapter(adapter)
    base, tuned = speakers(model, max_new_tokens=chosen.discovery.max_new_tokens, batch_size=None)
    budget = Budget(tau=tau, relative=relative)
    found = propose_doses(
        base,
        tuned,
        judging,
        apply_system(core, chosen.system),
        sae,
        scale=scale,
        reporting=final,
        latents=latents or None,
        n_prompts=n_prompts,
        budget=budget,
        seed=seed,
    )
    rows = found.frame.to_dict("records")
    show(
        [
            {
                "arm": row["arm"],
                "dose": f"{row['dose']:g}",
                "incoherent": str(Rate(k=row["incoherent"], n=row["n"])),
                "directions within": f"{row['within']} of {row['of']}",
            }
            for row in rows
        ],
        f"coherence under steering; proposed: induce_dose={found.induce_dose:g}, repair_dose={found.repair_dose:g}",
    )
    if figure is not None:
        plots.save(plots.doses(found.frame, induce_dose=found.induce_dose, repair_dose=found.repair_dose), figure)


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


def main(args: list[str] | None = None) -> None:
    """Run one command; an expected error is one line, not a traceback (BLOCKEM_TRACEBACK=1 shows it)."""
    args = sys.argv[1:] if args is None else args
    if args[:1] == ["data"] and len(args) > 1 and not args[1].startswith("-"):
        args = [f"data {args[1]}", *args[2:]]  # `blockem data fetch NAME`: two words make one command
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, args=args, description=__doc__)
    except (ValueError, ConnectionError, ImportError, OSError) as error:
        if os.environ.get("BLOCKEM_TRACEBACK"):
            raise
        sys.exit(f"blockem: {error}")


if __name__ == "__main__":
    main()
