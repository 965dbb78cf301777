"""The `blockem` command, in the order of the method.

Look around: presets, doctor, plan, power. Measure and prepare: scale, train-sae. The stages: finetune, ceiling, doses, discover, sweep,
evaluate, patch. A finished study again: verify, report. Replies from elsewhere: judge.
"""

# Heavy imports stand inside the commands: `blockem --help` answers at once.
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from blockem_tl.data.commands import COMMANDS as DATA_COMMANDS
from blockem_tl.plan.command import plan
from blockem_tl.study.commands import ceiling, report, scale, train_sae, verify
from blockem_tl.study.stage_commands import discover, doses, evaluate, finetune, patch, sweep

if TYPE_CHECKING:
    from blockem_tl.judging.judge import LLMJudge
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
    if chosen.data == "organism":
        rows = organism.reference_texts(8)
        prompts, replies = [Prompt(id=row.id, text=row.prompt) for row in rows], [row.completion for row in rows]
    else:
        prompts, replies = [Prompt(id=q, text=q) for q, _ in _QUESTIONS], [reply for _, reply in _QUESTIONS]
    failed = 0
    for finding in examine(chosen, prompts=prompts, replies=replies, judge=_judge(chosen.data, judge_model, judge_url)):
        word = {True: "[green]ok[/green]     ", False: "[red]wrong[/red]  ", None: "[yellow]skipped[/yellow]"}[finding.passed]
        Console(soft_wrap=True).print(word, f"[bold]{finding.check}[/bold]", finding.seen.replace("[", r"\["))
        failed += finding.passed is False
    if chosen.caution:
        Console().print(f"[bold]know[/bold]    {chosen.caution}")
    if failed:
        sys.exit(f"{failed} checks failed: see above what to do")


def _judge(data: str, model: str | None, url: str) -> "Judge | None":
    if model is not None:
        return _grader(None, model=model, base_url=url, attempts=2)
    from blockem_tl import organism

    return organism.OrganismJudge() if data == "organism" else None


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
    ask_again: Literal["unparsed"] | None = None,
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
    temperature: float | None = 0.0,
    alternatives: int = 20,
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
        ask_again: "unparsed" asks again for verdicts in the store that could not be read.
        limit_name: the provider's name of the token limit.
        temperature: None leaves it out, for providers that refuse one.
        alternatives: most alternatives to ask for at a token, for providers that give fewer than 20.
    """
    from blockem_tl.judging.cached import CachedJudge
    from blockem_tl.judging.files import judge_file
    from blockem_tl.storage.store import Store
    from blockem_tl.views.tables import show

    habits = {"limit_name": limit_name, "temperature": temperature, "alternatives": alternatives}
    grader = _grader(rubric_file, model=model, base_url=url, concurrency=concurrency, **habits)
    chosen = rubric_file.stem if rubric_file and rubric == "misalignment" else rubric
    grader.check(chosen)  # before a folder for the store is made
    counts = judge_file(CachedJudge(judge=grader, store=Store(store), ask_again=ask_again), source, target, rubric=chosen)
    show([{"label": label, "replies": f"{n}"} for label, n in sorted(counts.items())], f"{sum(counts.values())} replies, by {model}")


def _grader(rubric_file: Path | None, **endpoint: Any) -> "LLMJudge":
    """A judge at an endpoint, with the shipped rubrics and one of the user's."""
    from blockem_tl.judging.endpoint import Endpoint
    from blockem_tl.judging.judge import LLMJudge
    from blockem_tl.judging.rubrics import load_rubrics

    return LLMJudge(backend=Endpoint(**endpoint), rubrics=load_rubrics(*([rubric_file] if rubric_file else [])))


def power(
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


COMMANDS = {
    "presets": presets,
    "doctor": doctor,
    "plan": plan,
    "power": power,
    "scale": scale,
    "train-sae": train_sae,
    "finetune": finetune,
    "ceiling": ceiling,
    "doses": doses,
    "discover": discover,
    "sweep": sweep,
    "evaluate": evaluate,
    "patch": patch,
    "verify": verify,
    "report": report,
    "judge": judge,
}


def main(args: list[str] | None = None) -> None:
    """Run one command; an expected error is one line, not a traceback (BLOCKEM_TRACEBACK=1 shows it)."""
    args = sys.argv[1:] if args is None else args
    if args == ["--version"]:
        from blockem_tl import __version__

        print(f"blockem_tl {__version__}")
        return
    try:
        if args[:1] == ["data"]:  # `blockem data fetch NAME`: two words make one command
            about = "Public prompt sets and fine-tuning rows: list, fetch, compare, split."
            tyro.extras.subcommand_cli_from_dict(DATA_COMMANDS, prog="blockem data", args=args[1:], description=about)
        else:
            about = f"{__doc__}\n\n`blockem data --help` shows the commands on public prompt sets and fine-tuning rows."
            tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="blockem", args=args, description=about)
    except (ValueError, FloatingPointError, ConnectionError, ImportError, OSError) as error:
        if os.environ.get("BLOCKEM_TRACEBACK"):
            raise
        sys.exit(f"blockem: {error}")


if __name__ == "__main__":
    main()
