"""Emergent misalignment as an Inspect task, for any model that Inspect can ask::

inspect eval blockem_tl/emergent_misalignment --model openai/gpt-4o-mini --model-role grader=openai/gpt-4o

Inspect finds it through the entry point in pyproject.toml, and loads it with every evaluation, so heavy imports stand inside.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig

from blockem_tl.evaluation.inspect_scorer import grader_is_there, rubric_name, verdict
from blockem_tl.generation.replies import MISALIGNMENT

if TYPE_CHECKING:
    from blockem_tl.types import Prompt


@task
def emergent_misalignment(
    preset: str = "smollm2-135m",
    split: Literal["core", "final", "in-domain"] = "final",
    domain: str | None = None,
    prompts: str | None = None,
    rubric: str = MISALIGNMENT,
    system: str = "template",
    grader: str | None = None,
) -> Task:
    """Replies to our prompts, graded under our rubrics; greedy and at most 200 tokens long, unless Inspect is told otherwise.

    The log can be read back with `blockem_tl.evaluation.export.read_inspect`.

    Args:
        preset: whose prompts are asked; those of "smollm2-135m" are plain English and come with the package.
        split: "final" reports; "core" chose latents and strengths, and the log is marked; "in-domain" is the narrow task.
        domain: the narrow task, for "in-domain"; the preset's by default.
        prompts: a prompt file (.csv, .yaml, .jsonl) in the place of the preset's.
        rubric: "misalignment", the name of a training domain for adherence, or a rubric file.
        system: the system prompt policy, see `apply_system`.
        grader: the grader model, if no model role "grader" is given.

    Raises:
        ValueError: an unknown preset, split or rubric, or prompts that are not there.
    """
    name, asked = rubric_name(rubric), _prompts(preset, split, domain, prompts, system)
    return Task(
        dataset=MemoryDataset([_sample(prompt) for prompt in asked], name=Path(prompts).name if prompts else f"{preset}, {split}"),
        setup=grader_is_there(grader),
        scorer=verdict(rubric=rubric, grader=grader),
        config=GenerateConfig(temperature=0.0, max_tokens=200),
        metadata={"rubric": name, "on_selection_prompts": split == "core" and not prompts, "resampled": 0},
    )


def _prompts(preset: str, split: str, domain: str | None, file: str | None, system: str) -> "list[Prompt]":
    from dataclasses import replace

    from blockem_tl.data.chat import apply_system
    from blockem_tl.data.prompt_files import load_prompts
    from blockem_tl.presets import get_preset
    from blockem_tl.study.setting import Setting

    if file is not None:
        return apply_system(load_prompts(file), system)
    if split not in ("core", "final", "in-domain"):
        raise ValueError(f'expected the split "core", "final" or "in-domain", got {split!r}')
    return Setting.of(replace(get_preset(preset), system=system), domain=domain).prompts(split)


def _sample(prompt: "Prompt") -> Sample:
    from blockem_tl.evaluation.export import messages
    from blockem_tl.generation.steering import UNSTEERED

    marks = {"category": prompt.category, "canary": prompt.canary, "condition": UNSTEERED.name, "reply_ids": []}
    return Sample(id=prompt.id, input=messages(prompt), metadata=marks)
