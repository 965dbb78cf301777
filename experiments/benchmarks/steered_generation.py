"""Steered replies per second: the engines against loops over one condition at a time, the gain of refilling, memory, a GPU's roofline.

    python experiments/benchmarks/steered_generation.py --json speed.json                    # a 7M Llama, one thread, about four minutes
    python experiments/benchmarks/steered_generation.py --shape llama-3.1-8b --parts speed   # random weights of the real shape, on a GPU
    python experiments/benchmarks/steered_generation.py --vllm                               # in the environment that has vLLM

Every contender first makes the same replies; in float32 they must be equal. Then they take turns, and medians are compared. No token ends
a reply here, so lengths are what is asked for.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from random_llama import SHAPES, random_weights, words
from torch import Tensor
from transformers import LlamaForCausalLM
from turns import medians, take_turns

from blockem_tl import Condition, Prompt, Steering, TransformerLensEngine, load_engine, load_model
from blockem_tl.data.chat import encode_prompts, pad
from blockem_tl.generation.engine import Engine
from blockem_tl.models._sources import default_device
from blockem_tl.models.load import Model
from blockem_tl.models.memory import rows_at_once
from blockem_tl.storage.files import environment, peak_rss_mb, write_json

Replies = list[list[tuple[int, ...]]]  # by condition, by prompt
Contender = Callable[[], Replies]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the measurement.

    tokens: of every reply.  short: of every other reply, where refilling is measured.  batch_size: None is the engine's own choice.
    parts: speed, refill and memory in this environment.  vllm: instead, vLLM against the same loop.
    json: where to write all numbers.
    """

    shape: Literal["small", "small-grouped", "llama-3.2-1b", "llama-3.1-8b"] = "small"
    conditions: int = 32
    prompts: int = 16
    tokens: int = 48
    short: int = 8
    batch_size: int | None = None
    repetitions: int = 5
    parts: tuple[Literal["speed", "refill", "memory"], ...] = ("speed", "refill", "memory")
    vllm: bool = False
    json: Path | None = None


class Setup:
    """Random weights of a shape, twice (in plain transformers and in the bridge), prompts of 8 words and more, and conditions."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.device = settings, default_device(None)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.block = SHAPES[settings.shape]["num_hidden_layers"] // 2
        self.prompts = [Prompt(id=str(p), text=" ".join(f"w{(31 * p + i) % 997}" for i in range(8 + p))) for p in range(settings.prompts)]
        self.limits = [settings.tokens] * settings.prompts
        self.temporary = tempfile.TemporaryDirectory(prefix="steered_generation")

    @cached_property
    def folder(self) -> Path:
        """The model and its tokenizer on disk, for engines that read them there."""
        folder = Path(self.temporary.name) / "model"
        self.plain.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder

    @cached_property
    def tokenizer(self) -> Any:
        return words(SHAPES[self.settings.shape]["vocab_size"])

    @cached_property
    def plain(self) -> LlamaForCausalLM:
        """Plain transformers, with its own default attention."""
        return random_weights(self.settings.shape, attention="sdpa")

    @cached_property
    def model(self) -> Model:
        """The same weights in TransformerLens's bridge, which has eager attention."""
        model = load_model(random_weights(self.settings.shape), tokenizer=self.tokenizer)
        model.tokenizer.eos_token = None  # the bridge gives every tokenizer one, and random weights would hit it
        return model

    @cached_property
    def conditions(self) -> list[Condition]:
        """One direction and dose each, mid-model; the first is unsteered."""
        site, width = f"blocks.{self.block}.hook_resid_post", SHAPES[self.settings.shape]["hidden_size"]
        generator = torch.Generator().manual_seed(1)
        directions = torch.nn.functional.normalize(torch.randn(self.settings.conditions, width, generator=generator), dim=-1)
        return [
            Condition(name=str(c), steering=(Steering(site=site, direction=d, dose=(c % 8 - 3) / 4, scale=8.0),) if c else ())
            for c, d in enumerate(directions)
        ]

    @cached_property
    def padded(self) -> dict[str, Tensor]:
        """All prompts as one left-padded batch."""
        batch = pad(encode_prompts(self.tokenizer, self.prompts), 0, side="left", device=self.device)
        return {"ids": batch.ids, "mask": batch.mask.long()}


# ------------------------------------------------------------------------------------------------ contenders


def replies_of(engine: Engine, setup: Setup, limits: Sequence[int], conditions: Sequence[Condition] | None = None) -> Replies:
    """An engine's replies, conditions in order."""
    conditions = setup.conditions if conditions is None else conditions
    found: dict[int, list[tuple[int, ...]]] = {}
    for c, generations in engine.stream(setup.prompts, conditions=conditions, max_new_tokens=limits, progress=False):
        found[c] = [g.reply_ids for g in generations]
    return [found[c] for c in range(len(conditions))]


@torch.no_grad()
def transformers_loop(setup: Setup) -> Replies:
    """transformers' generate with a forward hook, one condition at a time, all its prompts as one batch."""
    replies, start = [], setup.padded["ids"].shape[1]
    for condition in setup.conditions:
        handle = None
        for steering in condition.steering:
            vector = steering.vector.to(setup.device, setup.dtype)
            handle = setup.plain.model.layers[setup.block].register_forward_hook(lambda module, args, out, v=vector: out + v)
        out = setup.plain.generate(  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            setup.padded["ids"], attention_mask=setup.padded["mask"], max_new_tokens=setup.settings.tokens, do_sample=False
        )
        replies.append([tuple(row) for row in out[:, start:].tolist()])
        if handle is not None:
            handle.remove()
    return replies


@torch.no_grad()
def transformer_lens_loop(setup: Setup) -> Replies:
    """TransformerLens's own generate with a hook, one condition at a time."""
    replies, start = [], setup.padded["ids"].shape[1]
    for condition in setup.conditions:
        vectors = [(s.site, s.vector.to(setup.device, setup.dtype)) for s in condition.steering]
        with setup.model.hooks(fwd_hooks=[(site, lambda activation, hook, v=vector: activation + v) for site, vector in vectors]):
            out = setup.model.generate(
                setup.padded["ids"],
                attention_mask=setup.padded["mask"],
                max_new_tokens=setup.settings.tokens,
                stop_at_eos=False,
                do_sample=False,
                verbose=False,
                return_type="tokens",
            )
        replies.append([tuple(row) for row in out[:, start:].tolist()])  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue, reportArgumentType]
    return replies


# ------------------------------------------------------------------------------------------------ parts


def compare(contenders: Mapping[str, Contender], repetitions: int, *, strict: bool) -> dict[str, Any]:
    """Let contenders reply once and compare what they said; then let them take turns. Raises AssertionError for unequal replies."""
    said = {name: contender() for name, contender in contenders.items()}
    reference = next(iter(said.values()))
    equal = {
        name: sum(a == b for one, other in zip(reference, replies, strict=True) for a, b in zip(one, other, strict=True))
        / sum(len(one) for one in reference)
        for name, replies in said.items()
    }
    if strict and min(equal.values()) < 1:
        raise AssertionError(f"share of replies that equal the first contender's: {equal}")
    seconds = take_turns(contenders, repetitions, default_device(None))
    n_tokens = sum(len(reply) for one in reference for reply in one)
    return {
        "tokens": n_tokens,
        "equal_replies": equal,
        "seconds": {name: [one.wall for one in times] for name, times in seconds.items()},
        "cpu_seconds": {name: [one.cpu for one in times] for name, times in seconds.items()},
        "median_tokens_per_s": {name: n_tokens / medians(times).wall for name, times in seconds.items()},
        "median_tokens_per_cpu_s": {name: n_tokens / medians(times).cpu for name, times in seconds.items()},
    }


def ratio(part: Mapping[str, Any], over: str, under: str, per: str = "s") -> float:
    """Tokens of ``over`` in tokens of ``under``, per second or per "cpu_s" (which a busy machine disturbs less)."""
    return part[f"median_tokens_per_{per}"][over] / part[f"median_tokens_per_{per}"][under]


def speed(setup: Setup) -> dict[str, Any]:
    """The TransformerLens engine against both loops."""
    engine = TransformerLensEngine(setup.model, batch_size=setup.settings.batch_size)
    part = compare(
        {
            "transformers_loop": lambda: transformers_loop(setup),
            "transformer_lens_loop": lambda: transformer_lens_loop(setup),
            "engine": lambda: replies_of(engine, setup, setup.limits),
        },
        setup.settings.repetitions,
        strict=setup.dtype == torch.float32,
    )
    found = {
        "tl_vs_transformers_loop": ratio(part, "engine", "transformers_loop"),
        "tl_vs_tl_loop": ratio(part, "engine", "transformer_lens_loop"),
        "tl_vs_transformers_loop_cpu": ratio(part, "engine", "transformers_loop", per="cpu_s"),
        "tl_vs_tl_loop_cpu": ratio(part, "engine", "transformer_lens_loop", per="cpu_s"),
        "speed": part,
    }
    return found | ({"roofline": roofline(setup, part)} if setup.device.type == "cuda" else {})


def refill(setup: Setup) -> dict[str, Any]:
    """Every other reply short. A batch that is not refilled runs until its longest row ends, as transformers' generate does.

    shrinking: a batch that is not refilled either, but drops its finished rows. There are eight batches' worth of rows (discovery has
    hundreds): with two there would be next to nothing to refill with.
    """
    limits = [setup.settings.short if p % 2 else setup.settings.tokens for p in range(setup.settings.prompts)]
    size = setup.settings.batch_size or max(1, len(setup.conditions) * len(setup.prompts) // 8)
    engine, shrinking = (TransformerLensEngine(setup.model, batch_size=size, refill=refilled) for refilled in (True, False))

    def whole_batches() -> Replies:
        replies = replies_of(engine, setup, setup.limits)
        return [[reply[:limit] for reply, limit in zip(one, limits, strict=True)] for one in replies]

    part = compare(
        {
            "not_refilled": whole_batches,
            "shrinking": lambda: replies_of(shrinking, setup, limits),
            "refilled": lambda: replies_of(engine, setup, limits),
        },
        setup.settings.repetitions,
        strict=setup.dtype == torch.float32,
    )
    return {
        "refill_speedup": ratio(part, "refilled", "not_refilled"),
        "refill_speedup_over_shrinking": ratio(part, "refilled", "shrinking"),
        "refill_speedup_cpu": ratio(part, "refilled", "not_refilled", per="cpu_s"),
        "refill_batch_size": size,
        "refill": part,
    }


def memory(setup: Setup) -> dict[str, Any]:
    """Peak memory with 10 times the conditions, each in a process of its own; replies are dropped as they come."""
    few, many = setup.settings.conditions, 10 * setup.settings.conditions
    peaks = {}
    for n in (few, many):
        settings = replace(setup.settings, conditions=n, prompts=4, tokens=8, batch_size=setup.settings.batch_size or 64)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            peaks[n] = pool.submit(peak_mb, settings).result()
    return {"memory_ratio": peaks[many] / peaks[few], "peak_rss_mb": {str(n): peak for n, peak in peaks.items()}}


def peak_mb(settings: Settings) -> float:
    """Peak resident memory of this process after streaming all conditions."""
    torch.set_num_threads(1)
    setup = Setup(settings)
    engine = TransformerLensEngine(setup.model, batch_size=settings.batch_size)
    for _ in engine.stream(setup.prompts, conditions=setup.conditions, max_new_tokens=settings.tokens, progress=False):
        pass
    return peak_rss_mb()


def roofline(setup: Setup, part: Mapping[str, Any]) -> dict[str, float]:
    """The most tokens per second that memory allows: every step reads the weights once, and keys and values of every row."""
    shape, width = SHAPES[setup.settings.shape], torch.finfo(setup.dtype).bits // 8
    longest = setup.padded["ids"].shape[1] + setup.settings.tokens
    rows = min(setup.settings.batch_size or rows_at_once(setup.model, longest, most=256), len(setup.conditions) * len(setup.prompts))
    weights = sum(p.numel() for name, p in setup.plain.named_parameters() if "embed_tokens" not in name) * width
    head = shape["hidden_size"] // shape["num_attention_heads"]
    kv = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head * width * (longest - setup.settings.tokens / 2)
    bandwidth = measured_bandwidth(setup.device)
    most = rows * bandwidth / (weights + rows * kv)
    return {
        "batch": rows,
        "bandwidth_bytes_per_s": bandwidth,
        "bytes_per_step": weights + rows * kv,
        "roofline_tokens_per_s": most,
        "engine_share_of_roofline": part["median_tokens_per_s"]["engine"] / most,
    }


def measured_bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy of 2 GB, read and written."""
    source = torch.empty(2**30, dtype=torch.int16, device=device)
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    torch.cuda.synchronize(device)
    return 10 * 2 * source.numel() * source.element_size() / (time.perf_counter() - start)


def vllm(setup: Setup) -> dict[str, Any]:
    """The vLLM engine against the loop, and against itself without steering. Needs the environment of `make install-vllm`.

    Its code is compiled and sums in another order than transformers: replies may differ where two tokens are within rounding of each other,
    and `equal_replies` says how many did not (tests/generation/test_vllm_engine.py has the equality).
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # one thread, like the loop
    engine = load_engine("vllm", model=setup.folder)
    unsteered = [Condition(name=condition.name) for condition in setup.conditions]
    part = compare(
        {
            "transformers_loop": lambda: transformers_loop(setup),
            "vllm": lambda: replies_of(engine, setup, setup.limits),
            "vllm_unsteered": lambda: replies_of(engine, setup, setup.limits, unsteered),
        },
        setup.settings.repetitions,
        strict=False,
    )
    if part["equal_replies"]["vllm"] < 0.98 and setup.dtype == torch.float32:
        raise AssertionError(f"share of replies that equal transformers': {part['equal_replies']}")
    return {
        "vllm_vs_transformers_loop": ratio(part, "vllm", "transformers_loop"),
        "vllm_steered_vs_unsteered": ratio(part, "vllm", "vllm_unsteered"),
        "vllm": part,
    }


def run(settings: Settings) -> dict[str, Any]:
    """All parts that are asked for."""
    torch.set_num_threads(1)
    setup = Setup(settings)
    parts: dict[str, Callable[[Setup], dict[str, Any]]] = {"speed": speed, "refill": refill, "memory": memory}
    found: dict[str, Any] = {
        "shape": settings.shape,
        "parameters": sum(p.numel() for p in setup.plain.parameters()),
        "device": str(setup.device),
        "dtype": str(setup.dtype),
        "conditions": settings.conditions,
        "prompts": settings.prompts,
        "tokens": settings.tokens,
        "batch_size": settings.batch_size or "automatic",
        "repetitions": settings.repetitions,
        "environment": environment(),
    }
    for part in [vllm] if settings.vllm else [parts[name] for name in settings.parts]:
        found |= part(setup)
    return found


if __name__ == "__main__":
    chosen = tyro.cli(Settings, description=__doc__)
    result = run(chosen)
    for key, value in result.items():
        if isinstance(value, int | float | str):
            print(f"{key:32} {value:.3f}" if isinstance(value, float) else f"{key:32} {value}")
        elif "median_tokens_per_s" in value:
            print(f"{key:32} " + ", ".join(f"{name} {rate:.0f}" for name, rate in value["median_tokens_per_s"].items()) + " tokens/s")
    if chosen.json is not None:
        print(f"written to {write_json(chosen.json, result)}")
