"""`generate`: replies to prompts under steering conditions; and the contract of the engines that make them."""

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedModel

from blockem_tl.generation._scheduler import make_job, run_job
from blockem_tl.generation.replies import Replies
from blockem_tl.generation.steering import UNSTEERED, Condition
from blockem_tl.hooks import Hook
from blockem_tl.models.load import Model, load_model
from blockem_tl.types import Generation, Prompt


@runtime_checkable
class Engine(Protocol):
    """Anything that replies under steering: `TransformerLensEngine` here, `VLLMEngine` in `generation.vllm`. Both give the same replies."""

    @property
    def name(self) -> str:
        """Names the engine in records and errors."""
        ...

    def stream(
        self,
        prompts: Sequence[Prompt],
        *,
        conditions: Sequence[Condition] = (UNSTEERED,),
        prompt_indices: Sequence[Sequence[int]] | None = None,
        adapter: str | Path | None = None,
        max_new_tokens: int | Sequence[int] = 64,
        temperature: float = 0.0,
        seed: int = 0,
        progress: bool = True,
    ) -> Iterator[tuple[int, list[Generation]]]:
        """Yield (index of the condition, its replies in prompt order) as each condition finishes.

        Args:
            prompt_indices: for each condition the indices of the prompts that it asks, in the order of its replies; None: all prompts.
            adapter: which weights act: "base", an adapter by name, or (TransformerLens) a folder; None: the model as it stands.
            max_new_tokens: for all prompts, or one number per prompt.
            temperature: 0 is greedy.  seed: of sampling.

        Raises:
            ValueError: bad prompts or conditions, a site or adapter that the engine cannot serve, before anything is generated.
            HookNotFired: steering that never acted.
        """
        ...


@runtime_checkable
class Identified(Protocol):
    """An engine that can say which weights it runs, so that its replies can be kept (see `generation.replies`)."""

    def identity(self, adapter: str | Path | None) -> str:
        """Identity of the contents of model and adapter and of their precision, whatever they are called."""
        ...


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    adapter: str | Path | None = None,
    conditions: Sequence[Condition] = (UNSTEERED,),
    hooks: Iterable[Hook] = (),
    max_new_tokens: int | Sequence[int] = 64,
    batch_size: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    progress: bool = True,
) -> Replies:
    """Reply to every prompt under every condition, in the order of the conditions and of the prompts.

    `generate_stream`, collected: see there for the arguments and errors.
    """
    stream = generate_stream(
        model,
        prompts,
        adapter=adapter,
        conditions=conditions,
        hooks=hooks,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
        progress=progress,
    )
    replies = dict(stream)
    return Replies.of(generation for c in range(len(conditions)) for generation in replies[c])


def generate_stream(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    conditions: Sequence[Condition] = (UNSTEERED,),
    prompt_indices: Sequence[Sequence[int]] | None = None,
    adapter: str | Path | None = None,
    hooks: Iterable[Hook] = (),
    max_new_tokens: int | Sequence[int] = 64,
    batch_size: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[tuple[int, list[Generation]]]:
    """Yield (index of the condition, its replies in prompt order) as each condition finishes; at a yield no hook is attached.

    ``hooks`` act on all rows, besides the conditions; a hook that must know which token it sees asks `current_step`.

    Args:
        prompt_indices: for each condition the indices of the prompts that it asks, in the order of its replies; None: all prompts.
        adapter: which weights act: "base", an adapter by name or in a folder; None: the model as it stands.
        max_new_tokens: for all prompts, or one number per prompt.
        batch_size: rows that run at once; None asks the free memory (see `models.memory`). Where memory runs out all the
            same, the batch is halved with a warning, and the rows that ran begin again (a hook of yours sees them twice).
        temperature: 0 is greedy. Otherwise each row draws from its own stream of random numbers, set by ``seed``, the condition's name and
            the prompt's id, so a sample depends neither on the batch size nor on what else is asked.

    Raises:
        ValueError: bad prompts or conditions, an unknown site, one that is no [batch pos d_model], a direction of the wrong width, or a
            prompt too long for the context; before anything is generated.
        HookNotFired: a hook or a condition that never acted.
        MemoryError: not even one row fits.
    """
    job = make_job(model, prompts, conditions, hooks, max_new_tokens, temperature, seed, prompt_indices, adapter)
    return run_job(job, batch_size, progress=progress)


class TransformerLensEngine:
    """An `Engine` on one model with live adapters, base and tuned alike.

    Args:
        batch_size: rows that run at once; None asks the free memory.
        refill: whether waiting rows take the places of finished ones; False waits for a whole batch to end (for comparison).
    """

    name = "transformer_lens"

    def __init__(self, model: Model, *, batch_size: int | None = None, refill: bool = True) -> None:
        self.model, self.batch_size, self.refill = model, batch_size, refill

    def stream(
        self,
        prompts: Sequence[Prompt],
        *,
        conditions: Sequence[Condition] = (UNSTEERED,),
        prompt_indices: Sequence[Sequence[int]] | None = None,
        adapter: str | Path | None = None,
        max_new_tokens: int | Sequence[int] = 64,
        temperature: float = 0.0,
        seed: int = 0,
        progress: bool = True,
    ) -> Iterator[tuple[int, list[Generation]]]:
        """See `Engine.stream`; at a yield, and afterwards, the model is as it was: its adapter, no hooks."""
        job = make_job(self.model, prompts, conditions, (), max_new_tokens, temperature, seed, prompt_indices, adapter)
        return run_job(job, self.batch_size, refill=self.refill, progress=progress)


ENGINES = ("transformer_lens", "vllm")


def load_engine(
    name: str, *, model: Model | str | Path | PreTrainedModel, adapters: Mapping[str, str | Path] | None = None, **options: Any
) -> Engine:
    """The engine called ``name``.

    Args:
        name: "transformer_lens", or "vllm".
        model: an embedded name, a folder or a hub id; for transformer_lens also a model that is loaded already.
        adapters: folders of LoRA adapters by the names that ``stream(adapter=...)`` will know them by.
        options: of the engine: see `TransformerLensEngine` (``batch_size``, ``refill``; ``dtype``, ``device``
            and ``tokenizer`` go to `load_model`) and `blockem_tl.generation.vllm.engine.VLLMEngine`.

    Raises:
        ValueError: an unknown engine, a model that the engine cannot use, or an adapter that cannot be loaded.
        ImportError: an engine that is not installed, with the command that installs it.
    """
    if adapters is not None and not isinstance(adapters, Mapping):
        raise TypeError(f"load_engine: expected adapters as a dict {{name: folder}}, got {adapters!r} ({type(adapters).__name__})")
    adapters = dict(adapters or {})
    if name == "transformer_lens":
        return _transformer_lens(model, adapters, options)
    if name == "vllm":
        return _vllm(model, adapters, options)
    raise ValueError(f"unknown engine {name!r}: expected one of {', '.join(ENGINES)}")


def _transformer_lens(model: Model | str | Path | PreTrainedModel, adapters: dict[str, str | Path], options: dict[str, Any]) -> Engine:
    loading = {key: options.pop(key) for key in ("dtype", "device", "tokenizer") if key in options}
    if isinstance(model, Model):
        if loading:
            raise ValueError(f"engine 'transformer_lens': {sorted(loading)} are for loading, but the model is loaded already")
        loaded = model
    else:
        loaded = load_model(model, **loading)
    for adapter, folder in adapters.items():
        loaded.load_adapter(folder, adapter)
    return TransformerLensEngine(loaded, **options)


def _vllm(model: Model | str | Path | PreTrainedModel, adapters: dict[str, str | Path], options: dict[str, Any]) -> Engine:
    if not isinstance(model, str | Path):
        raise ValueError(
            f"engine 'vllm' reads weights from disk: expected model to be a name or folder, got a loaded {type(model).__name__}; "
            "save its adapters with save_adapter and pass their folders as adapters={name: folder}"
        )
    return importlib.import_module("blockem_tl.generation.vllm.engine").VLLMEngine(model, adapters, **options)
