"""The `blockem` commands that are the method's stages: finetune, doses, discover, sweep, evaluate, patch."""

# Heavy imports stand inside the commands: `--help` answers at once.
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from blockem_tl.study.setting import Setting

Preset = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PRESET")]
Adapter = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ADAPTER")]
Out = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
Defence = Literal["plain", "block", "kl", "ldifs", "interleaving", "caft", "preventative", "inoculation", "safelora"]
Split = Literal["final", "core", "in-domain"]


@dataclass(frozen=True, kw_only=True)
class SettingOptions:
    """Options of every stage.

    domain: the narrow task; the preset's by default.
    seed: of the draw of rows, and of training.
    judge_models: judging models, for presets without a judge; the first one selects.
    judge_urls: their endpoints, one for all or one each.
    """

    domain: str | None = None
    seed: int = 0
    judge_models: tuple[str, ...] = ()
    judge_urls: tuple[str, ...] = ("http://127.0.0.1:8000/v1",)

    def setting(self, preset: str) -> "Setting":
        """The preset's setting."""
        from blockem_tl.study.options import StudyOptions

        made = StudyOptions(preset=preset, domain=self.domain, judge_models=self.judge_models, judge_urls=self.judge_urls)
        return made.setting(self.seed)


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(SettingOptions):
    """Options of `blockem finetune`.

    defence: plain has none.
    strength: of the defence: lambda of block, the weight of kl and ldifs, the share of safe rows of interleaving, the number of latents
        of caft, the dose of preventative, the number of the preset's prefix of inoculation (from 1), the threshold of safelora.
    latents: a latent set's file, for block, caft and preventative.
    unaligned: for safelora the model before its alignment, a folder or a hub id; the preset's by default.
    epochs: of training; the preset's by default.
    freeze_downstream: LoRA only up to the site's block.
    n_rows: training rows; all by default.
    checkpoints_every: epochs between checkpoints, from which a killed training goes on.
    """

    defence: Defence = "plain"
    strength: float | None = None
    latents: Path | None = None
    unaligned: str = ""
    epochs: float | None = None
    freeze_downstream: bool = False
    n_rows: int | None = None
    checkpoints_every: float = 0.5


def finetune(preset: Preset, out: Out, /, *, options: tyro.conf.OmitArgPrefixes[FinetuneOptions] = FinetuneOptions()) -> None:
    """Fine-tune a preset's model on its narrow task, plainly or under a defence; broken off, it goes on from its last checkpoint.

    Args:
        preset: one of those that `blockem presets` lists.
        out: a folder of its own: adapter/, checkpoints/, and run.json with the losses step by step.
    """
    from blockem_tl.study.run import Run
    from blockem_tl.study.stages import train_into

    o = options
    if o.defence != "plain" and o.strength is None:
        raise ValueError(f"finetune: --defence {o.defence} needs --strength")
    setting = o.setting(preset)
    overrides: dict[str, Any] = {} if o.epochs is None else {"epochs": o.epochs}
    overrides |= setting.up_to_site if o.freeze_downstream else {}
    overrides |= {"unaligned": o.unaligned} if o.unaligned else {}
    run = Run(defence=o.defence, strength=o.strength or 0.0, overrides=overrides)
    found = train_into(out, setting, run, card=o.latents, n_rows=o.n_rows, every=o.checkpoints_every)
    print(f"{found['label']}: {found['steps']} steps, SFT loss {found['history'][-1]['sft']:.4f} at the last; {out / 'adapter'}")


@dataclass(frozen=True, kw_only=True)
class DoseOptions(SettingOptions):
    """Options of `blockem doses`.

    latents: steer along these latents' directions; by default 8 at random.
    n_prompts: how many core prompts are asked.
    max_incoherence: how much incoherence a dose may cost, as a fraction.
    relative: count it from the unsteered rate.
    figure: write a figure to this file.
    """

    latents: tuple[int, ...] = ()
    n_prompts: int = 20
    max_incoherence: float = 0.10
    relative: bool = False
    figure: Path | None = None


def doses(preset: Preset, adapter: Adapter, /, *, options: tyro.conf.OmitArgPrefixes[DoseOptions] = DoseOptions()) -> None:
    """Show at which doses a model stays coherent, and propose the doses of stage 2, from a few core prompts.

    Args:
        preset: one of those that `blockem presets` lists.
        adapter: of the fine-tuned model: its folder, or the one that `blockem finetune` trained into.
    """
    from blockem_tl.discovery.config import MaxIncoherence
    from blockem_tl.discovery.doses import propose_doses
    from blockem_tl.study.stages import tuned_at
    from blockem_tl.views import plots

    o, place, setting = options, tuned_at(adapter).adapter, options.setting(preset)
    core, judge = setting.prompts("core"), setting.judge  # before the model is loaded: they may not be there
    found = propose_doses(
        setting.model,
        setting.sae,
        judge,
        core,
        reporting=setting.prompts("final"),
        adapter=place,
        scale=setting.scale(),
        latents=o.latents or None,
        n_prompts=o.n_prompts,
        seed=o.seed,
        max_new_tokens=setting.preset.discovery.max_new_tokens,
        max_incoherence=MaxIncoherence(rate=o.max_incoherence, relative=o.relative),
    )
    print(found)
    if o.figure is not None:
        plots.save(found.plot(), o.figure)


@dataclass(frozen=True, kw_only=True)
class DiscoverOptions(SettingOptions):
    """Options of `blockem discover`.

    by: replies are judged, and kept with their verdicts as soon as they are there; pairs need no judge.
    executor: "ray" for several machines or GPUs.
    workers: processes that share the replies, each with a model of its own; the latent set is the same.
    engine: vllm makes the replies faster on a GPU.
    cards: of each worker: vLLM's tensor parallel.
    gpu_memory: share of each card that vLLM takes; this process' own model lies beside it on the first.
    smallest_wave: replies that are asked at a time at least: some 64 for each card keep several busy.
    """

    by: Literal["replies", "pairs"] = "replies"
    executor: Literal["local", "ray"] = "local"
    workers: int | None = None
    engine: Literal["transformer_lens", "vllm"] = "transformer_lens"
    cards: int = 1
    gpu_memory: float = 0.7
    smallest_wave: int = 1


def discover(
    preset: Preset, adapter: Adapter, out: Out, /, *, options: tyro.conf.OmitArgPrefixes[DiscoverOptions] = DiscoverOptions()
) -> None:
    """Find the latents that carry what a plain fine-tune did, on the core prompts; broken off, it goes on where it was.

    Args:
        preset: one of those that `blockem presets` lists.
        adapter: of the plain fine-tune: its folder, or the one that `blockem finetune` trained into.
        out: a folder of its own: latents.json, what was measured as CSV, and the kept replies and verdicts.
    """
    from blockem_tl.study.sharding import WorkerEngine
    from blockem_tl.study.stages import discover_into

    o = options
    if o.engine != "vllm" and o.cards != 1:
        raise ValueError("discover: several cards for a worker are for --engine vllm; TransformerLens has a card of its own in each worker")
    vllm = WorkerEngine(name="vllm", options={"gpu_memory_utilization": o.gpu_memory, "tensor_parallel_size": o.cards})
    engine = vllm if o.engine == "vllm" else None
    workers = {"executor": o.executor, "workers": o.workers, "engine": engine, "smallest_wave": o.smallest_wave}
    print(discover_into(out, o.setting(preset), adapter, by=o.by, **workers))
    print(f"written: {out / 'latents.json'}")


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Options of `blockem sweep`.

    seeds: of the draw of rows, and of training.
    lambdas: the preset's by default.
    freeze_downstream: also train with LoRA up to the site's block alone.
    domain: the narrow task; the preset's by default.
    n_rows: training rows; all by default.
    executor: "ray" for several machines or GPUs.
    workers: processes.
    smallest_wave: replies that discovery asks at a time at least: some 64 for each card keep several busy.
    judge_models: judging models, for presets without a judge; the first one selects.
    judge_urls: their endpoints, one for all or one each.
    """

    seeds: tuple[int, ...] = (0,)
    lambdas: tuple[float, ...] = ()
    freeze_downstream: bool = False
    domain: str | None = None
    n_rows: int | None = None
    executor: Literal["local", "ray"] = "local"
    workers: int | None = None
    smallest_wave: int = 1
    judge_models: tuple[str, ...] = ()
    judge_urls: tuple[str, ...] = ("http://127.0.0.1:8000/v1",)


def sweep(preset: Preset, out: Out, /, *, options: tyro.conf.OmitArgPrefixes[SweepOptions] = SweepOptions()) -> None:
    """Fine-tune plainly, find K, block it with each lambda, and show all of them: the method in one study; broken off, it goes on.

    Args:
        preset: one of those that `blockem presets` lists.
        out: a folder of its own: tables and figures arms, core and training, and the study with its adapters.
    """
    from blockem_tl.study.options import StudyOptions
    from blockem_tl.study.sweep import lambda_sweep

    given = dict(vars(options))
    of_sweep = {name: given.pop(name) for name in ("lambdas", "freeze_downstream", "smallest_wave")}
    made = StudyOptions(preset=preset, out=out, **given)
    with made.study() as study:
        lambda_sweep(study, made.page(), **of_sweep)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(SettingOptions):
    """Options of `blockem evaluate`.

    split: final reports, core has chosen the latents, in-domain asks about the narrow task. One or several.
    n_prompts: of each split, categories as evenly as it allows; all by default.
    pairs: also show the margins of the preset's contrastive pairs, beside base's.
    """

    split: tuple[Split, ...] = ("final",)
    n_prompts: int | None = None
    pairs: bool = False


def evaluate(
    preset: Preset, adapter: Adapter, out: Out, /, *, options: tyro.conf.OmitArgPrefixes[EvaluateOptions] = EvaluateOptions()
) -> None:
    """Let an adapter reply, and show its rates with 95 % intervals; broken off, it goes on with the verdicts that are missing.

    Args:
        preset: one of those that `blockem presets` lists.
        adapter: its folder, the one that `blockem finetune` trained into, or base.
        out: a folder of its own: a table for each split, and all replies with their labels, as CSV.
    """
    from blockem_tl.study.stages import evaluate_into

    o = options
    evaluate_into(out, o.setting(preset), str(adapter), splits=o.split, n=o.n_prompts, pairs=o.pairs)


@dataclass(frozen=True, kw_only=True)
class PatchOptions(SettingOptions):
    """Options of `blockem patch`.

    by: replies are judged; pairs need no judge.
    split: final reports.
    when: over the prompt, at every decoding step, or both.
    sites: hook names; by default every block's output over the prompt, and the preset's site while decoding.
    components: over the prompt also every block's attention and MLP.
    reverse: put the adapter's states into base.
    n_prompts: of the split; all by default.
    """

    by: Literal["replies", "pairs"] = "replies"
    split: Split = "final"
    when: tuple[Literal["prompt", "decode"], ...] = ("prompt", "decode")
    sites: tuple[str, ...] = ()
    components: bool = False
    reverse: bool = False
    n_prompts: int | None = None


def patch(preset: Preset, adapter: Adapter, out: Out, /, *, options: tyro.conf.OmitArgPrefixes[PatchOptions] = PatchOptions()) -> None:
    """Put base's states into a fine-tuned model at site after site, and show what is left of its misalignment; broken off, it goes on.

    Args:
        preset: one of those that `blockem presets` lists.
        adapter: its folder, or the one that `blockem finetune` trained into.
        out: a folder of its own: the table and figure patched, and the labelled replies of each site.
    """
    from blockem_tl.study.stages import patch_into

    o = options
    places = {"sites": o.sites, "components": o.components, "reverse": o.reverse, "n": o.n_prompts}
    patch_into(out, o.setting(preset), adapter, by=o.by, split=o.split, when=o.when, **places)
