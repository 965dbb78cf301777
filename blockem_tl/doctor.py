"""`blockem doctor PRESET`: everything that can be found wrong before a long run, each finding with what to do about it."""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement
from sae_lens import SAE

from blockem_tl.data.chat import apply_system, encode_examples, encode_prompts
from blockem_tl.data.templates import template_head, thinking_argument
from blockem_tl.generation.selftest import checks, run_check
from blockem_tl.hooks import HookNotFired, record, steer
from blockem_tl.models.load import Model, load_model
from blockem_tl.presets import Preset
from blockem_tl.saes.fit import LEAST_EXPLAINED, explained_variance
from blockem_tl.saes.load import check_fits, load_sae
from blockem_tl.types import Example, Judge, Prompt

_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check: whether it passed (None: it was not made) and what was seen."""

    check: str
    passed: bool | None
    seen: str


def examine(
    preset: Preset,
    *,
    prompts: list[Prompt],
    replies: list[str],
    judge: Judge | None = None,
    folder: Path | None = None,
    device: str | None = None,
) -> Iterator[Finding]:
    """Check a preset on this machine, one finding at a time, cheap checks first.

    Args:
        prompts, replies: a few questions and plausible answers in the model's language, for reconstruction and the judge.
        judge: asked about the first reply; None skips that check.
        folder: where the run will write; the current one by default.
    """
    yield _guarded("versions", versions)
    yield _guarded("disk", lambda: disk(preset, folder or Path.cwd()))
    yield _guarded("memory", lambda: memory(preset))
    yield _guarded("judge", lambda: ask_judge(judge, prompts[0], replies[0])) if judge else _skipped("judge", "no judge was named")
    loaded: dict[str, Any] = {}
    yield _guarded(
        "model", lambda: _load(loaded, "model", lambda: load_model(preset.model, dtype=preset.dtype, device=device, check="off"))
    )
    yield _guarded("sae", lambda: _load(loaded, "sae", lambda: load_sae(*preset.sae, device=loaded["model"].device if loaded else "cpu")))
    model, sae = loaded.get("model"), loaded.get("sae")
    asked = [Example(id=p.id, prompt=p.text, completion=r, system=p.system) for p, r in zip(prompts, replies, strict=True)]
    if model is None or sae is None:
        names = ("chat template", "hooks", *(f"self-test: {name}" for name in checks("full")), "reconstruction")
        yield from (_skipped(name, "model and SAE have to load first") for name in names)
        return
    yield _guarded("chat template", lambda: chat_template(model, preset, asked))
    yield _guarded("hooks", lambda: hooks(model, preset.site, prompts))
    for name, check in checks("full").items():
        yield _guarded(f"self-test: {name}", partial(run_check, model, name, check))
    yield _guarded("reconstruction", lambda: reconstruction(model, sae, preset, asked))


def versions() -> str:
    """The installed versions, against those that this package asks for."""
    wrong, seen = [], []
    for line in metadata.requires("blockem-tl") or []:
        wanted = Requirement(line)
        if wanted.marker is None:
            installed = metadata.version(wanted.name)
            seen.append(f"{wanted.name} {installed}")
            if not wanted.specifier.contains(installed, prereleases=True):
                wrong.append(f"{wanted.name} {installed} (expected {wanted.specifier})")
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: install what is expected, for instance with make install")
    return ", ".join(name for name in seen if re.match("torch |transformer|sae|peft", name))


def disk(preset: Preset, folder: Path) -> str:
    """Free disk space where the run will write."""
    free, needed = shutil.disk_usage(folder).free / _GB, preset.requires.disk_gb
    if free < needed:
        raise ValueError(f"expected {needed:g} GB free at {folder}, got {free:.1f}: make room or write elsewhere")
    return f"{free:.0f} GB free, {needed:g} needed"


def memory(preset: Preset) -> str:
    """Free main memory, and free GPU memory where the preset needs a GPU."""
    free, needed = psutil.virtual_memory().available / _GB, preset.requires
    if free < needed.memory_gb:
        raise ValueError(f"expected {needed.memory_gb:g} GB of free memory, got {free:.1f}: end other programs or take a larger machine")
    if not needed.gpu_gb:
        return f"{free:.0f} GB free, {needed.memory_gb:g} needed; no GPU needed"
    if not torch.cuda.is_available():
        raise ValueError(f"expected a GPU with {needed.gpu_gb:g} GB, got none that torch can see: check the driver and the torch build")
    gpu = torch.cuda.mem_get_info()[0] / _GB
    if gpu < needed.gpu_gb * 0.9:
        raise ValueError(f"expected {needed.gpu_gb:g} GB of free GPU memory, got {gpu:.1f}: end what else runs there or take a larger GPU")
    return f"{free:.0f} GB free, {needed.memory_gb:g} needed; GPU {gpu:.0f} GB free, {needed.gpu_gb:g} needed"


def ask_judge(judge: Judge, prompt: Prompt, reply: str) -> str:
    """Whether the judge gives a verdict that can be read."""
    (verdict,) = judge.grade([prompt], [reply])
    if not verdict.parsed:
        raise ValueError(
            f"judge {judge.name!r} answered, but named no label: is it an instruction-tuned model, and the rubric one it follows?"
        )
    return f"{judge.name} says {verdict.label} of {reply[:40]!r}"


def chat_template(model: Model, preset: Preset, asked: list[Example]) -> str:
    """One BOS, a completion that can be told apart, and what the template writes before the question under the preset's policy."""
    row = encode_examples(model.tokenizer, apply_system(asked, preset.system))[0]
    system = apply_system(asked[:1], preset.system)[0].system
    thinks = thinking_argument(model.tokenizer)
    advice = f"; thoughts are switched by {thinks}: pin it with load_model(template_arguments=...)" if thinks else ""
    head = template_head(model.tokenizer, system)
    return f"{len(row.ids) - row.n_prompt} completion tokens; before the question stands {head!r}{advice}"


def hooks(model: Model, site: str, prompts: list[Prompt]) -> str:
    """Check that a hook at the site fires, steers and leaves nothing behind, and that one which cannot act is refused."""
    row = encode_prompts(model.tokenizer, prompts)[0]
    ids = torch.tensor([row.ids], device=model.device)
    store: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        plain = model.run_with_hooks(ids, fwd_hooks=[record(site, store)])
        width, norm = store[site].shape[-1], float(store[site].float().norm(dim=-1).median())
        direction = torch.zeros(width, device=model.device)
        direction[0] = 1.0
        steered = model.run_with_hooks(ids, fwd_hooks=[steer(site, direction, 10 * norm)])
        after = model(ids)
    if torch.equal(plain, steered) or not torch.equal(plain, after):
        raise ValueError(f"steering at {site} changed nothing, or stayed after its hook was gone: report this, results would be wrong")
    try:
        with model.hooks(fwd_hooks=[record(site, {})]):
            pass
    except HookNotFired:
        return f"{site} fires, steers and is clean afterwards; median norm {norm:.3g}"
    raise ValueError("a hook that never fired was not noticed: report this")


def reconstruction(model: Model, sae: SAE[Any], preset: Preset, asked: list[Example]) -> str:
    """The share of the residual's variance that the SAE gives back on a few prompts with replies, system tokens left out."""
    site = check_fits(sae, model)
    if site != preset.site:
        raise ValueError(f"expected an SAE of {preset.site}, got one of {site}")
    explained = explained_variance(model, sae, apply_system(asked, preset.system))
    if explained < LEAST_EXPLAINED:
        raise ValueError(
            f"the SAE explains {100 * explained:.0f} % of the variance at {site}, expected at least {100 * LEAST_EXPLAINED:.0f} %: "
            "is it this model's SAE, and is the model loaded unfolded and in the right dtype?"
        )
    return f"{100 * explained:.1f} % of the variance at {site} explained"


def _load(loaded: dict[str, Any], name: str, load: Callable[[], Any]) -> str:
    loaded[name] = load()
    return f"{type(loaded[name]).__name__} loaded"


def _guarded(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(check=name, passed=True, seen=check())
    except Exception as error:  # whatever is wrong is a finding: the other checks go on
        return Finding(check=name, passed=False, seen=str(error) or type(error).__name__)


def _skipped(name: str, why: str) -> Finding:
    return Finding(check=name, passed=None, seen=f"not checked: {why}")
