"""Steered replies from vLLM: every request of a running batch has its own condition. Needs the extra `vllm`, see docs/generation.md."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from blockem_tl.data.templates import end_tokens, pin_arguments
from blockem_tl.generation._scheduler import check_prompt_indices, check_request
from blockem_tl.generation.steering import UNSTEERED, Condition
from blockem_tl.generation.vllm.adapters import check_adapter
from blockem_tl.generation.vllm.jobs import Job, SteeredVLLM, Vectors, import_vllm
from blockem_tl.hooks import HookNotFired
from blockem_tl.models.lora import BASE
from blockem_tl.storage import embedded
from blockem_tl.storage.fingerprints import of_folder
from blockem_tl.types import Generation, Prompt
from blockem_tl.views.progress import progress_bar

LOUD = 1000.0
"""Standard deviation of the probe's vector: far above what a residual stream holds."""

AUDIBLE = 0.5
"""Change of a log-probability, in nats: above what bfloat16 and another batch do to it, far below what the probe does."""


class VLLMEngine:
    """vLLM behind the contract of `Engine`; use it as a context manager, or call `close`.

    Greedy replies are those of the TransformerLens engine (in float32 token for token). Sampled ones have the same distribution but come
    from vLLM's own random numbers, seeded by (seed, condition name, prompt id): they repeat, and they are other draws.

    Args:
        model: an embedded name, a local folder or a hub id.
        adapters: LoRA adapters by name, folders in peft's format (what ``Model.save_adapter`` writes), for ``stream(adapter=name)``.
        template_arguments: of the chat template, pinned as `load_model` pins them.
        dtype: of weights and vectors; float32 is also ``load_model``'s default. On a GPU you want "bfloat16".
        sites: what can be steered, ``blocks.N.hook_resid_post`` or ``hook_resid_pre`` (None: all of them; fewer cost a little less).
        max_model_len: longest prompt and reply together; default what the model says.
        max_num_seqs: requests in one batch.
        gpu_memory_utilization: share of each GPU's memory that vLLM takes.
        kv_cache_gib: size of the KV cache, instead of what is left of that share; on a CPU 1 by default.
        enforce_eager: neither compilation nor CUDA graphs: starts sooner, runs slower.
        options: anything else that ``vllm.EngineArgs`` takes.

    Raises:
        ImportError: vLLM is not installed; how to install it.
        ValueError: a model, site, adapter or option that cannot be served.
        RuntimeError: vLLM did not start, or is of another version.
        HookNotFired: steering does not change what this model says.
    """

    name = "vllm"

    def __init__(
        self,
        model: str | Path,
        adapters: Mapping[str, str | Path] | None = None,
        *,
        template_arguments: Mapping[str, bool | int | str | None] | None = None,
        dtype: str = "float32",
        sites: Sequence[str] | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        kv_cache_gib: float | None = None,
        enforce_eager: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        import_vllm()
        source = str(embedded.folder_of("model", str(model)) or model)
        self._source, self._dtype = source, dtype
        config = _config_of(source)
        text = config.get_text_config()
        self._d_model, self._n_blocks = int(text.hidden_size), int(text.num_hidden_layers)
        self._blocks = sorted(set(range(self._n_blocks) if sites is None else map(self._block, sites)))
        self.adapters = {name: Path(folder) for name, folder in (adapters or {}).items()}
        ranks = [check_adapter(folder, config) for folder in self.adapters.values()]
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
        pin_arguments(self.tokenizer, template_arguments or {})
        self._ends = _end_tokens(source, config, self.tokenizer)
        self._vllm = SteeredVLLM(
            model=source,
            blocks=self._blocks,
            adapters=self.adapters,
            max_lora_rank=max(ranks, default=0),
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_gib=kv_cache_gib,
            enforce_eager=enforce_eager,
            seed=seed,
            **options,
        )
        self._probe_or_close()

    def _probe_or_close(self) -> None:
        try:
            self.probe()
        except BaseException:
            self.close()
            raise

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
        """See `Engine.stream`. One stream at a time: exhaust or close it before the next.

        Raises:
            RuntimeError: another stream is open, the engine is closed, or vLLM died.
        """
        encoded, limits = check_request(self.tokenizer, self._vllm.context, prompts, conditions, max_new_tokens, temperature, seed)
        names, asked = [condition.name for condition in conditions], check_prompt_indices(prompt_indices, len(conditions), len(prompts))
        adapter = None if adapter in (None, BASE) else str(adapter)
        if adapter is not None and adapter not in self.adapters:
            raise ValueError(f"unknown adapter {adapter!r}: expected one of those the engine was made with, {sorted(self.adapters)}")
        for condition in conditions:  # made again when its turn comes: all at once they would take memory
            self._vectors(condition)

        def job(c: int) -> Job:
            requests = [(encoded[p].ids, self._parameters(limits[p], temperature, _seed(seed, names[c], prompts[p].id))) for p in asked[c]]
            return Job(vectors=self._vectors(conditions[c]), requests=requests, adapter=adapter)

        return self._replies([[prompts[p] for p in part] for part in asked], names, map(job, range(len(names))), progress)

    def identity(self, adapter: str | Path | None) -> str:
        """See `Identified`."""
        template = str(self.tokenizer.chat_template)
        parts = [
            of_folder(self._source),
            template,
            str(self._dtype),
            of_folder(self.adapters[str(adapter)]) if adapter not in (None, BASE) else "",
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def probe(self) -> None:
        """Check that a large vector changes what comes next at every block that can be steered, and that a zero vector does not.

        Raises:
            HookNotFired: otherwise.
        """
        loud = torch.randn(self._d_model, generator=torch.Generator().manual_seed(0)) * LOUD
        vectors: list[Vectors] = [{}, {self._blocks[0]: 0 * loud}, *({block: loud} for block in self._blocks)]
        ids = tuple(range(1, 9))
        jobs = (Job(vectors=v, requests=[(ids, self._parameters(1, logprobs=20))]) for v in vectors)
        said = {index: _logprobs(output) for index, (output,) in self._vllm.run(jobs)}
        deaf = [f"blocks.{block}.hook_resid_post" for i, block in enumerate(self._blocks, 2) if _distance(said[0], said[i]) < AUDIBLE]
        if deaf:
            raise HookNotFired(f"vLLM ran, and steering changed nothing at {deaf}: its hooks did not act in this model")
        if _distance(said[0], said[1]) >= AUDIBLE:
            raise HookNotFired(f"vLLM ran, and a zero vector at block {self._blocks[0]} changed what it says: requests get others' vectors")

    def close(self) -> None:
        """Stop vLLM's processes and give its memory back. May be called twice."""
        self._vllm.close()

    def __enter__(self) -> "VLLMEngine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _block(self, site: str) -> int:
        """The block after which a vector has to be added to act at ``site``."""
        match = re.fullmatch(r"blocks\.(\d+)\.(hook_resid_post|hook_out|hook_resid_pre|hook_in)", site)
        block = int(match[1]) - (match[2] in ("hook_resid_pre", "hook_in")) if match else -1
        if not 0 <= block < self._n_blocks:
            raise ValueError(
                f"a site the engine cannot steer: {site!r}. vLLM is steered at blocks.N.hook_resid_post, N from 0 to {self._n_blocks - 1}, "
                "and at blocks.N.hook_resid_pre from N = 1; the TransformerLens engine steers everywhere"
            )
        return block

    def _vectors(self, condition: Condition) -> Vectors:
        vectors: Vectors = {}
        for steering in condition.steering:
            block = self._block(steering.site)
            if block not in self._blocks:
                raise ValueError(f"condition {condition.name!r}: this engine was made without {steering.site} among its sites")
            if steering.direction.shape != (self._d_model,):
                raise ValueError(
                    f"condition {condition.name!r}: expected a direction of shape ({self._d_model},) for {steering.site}, "
                    f"got {tuple(steering.direction.shape)}"
                )
            vector = steering.vector.detach().float().cpu()
            vectors[block] = vectors[block] + vector if block in vectors else vector
        return vectors

    def _parameters(self, limit: int, temperature: float = 0.0, seed: int = 0, **choices: Any) -> Any:
        sampled = {"seed": seed} if temperature else {}  # vLLM takes a seeded request for a sampled one
        return self._vllm.parameters(stops=self._ends, max_tokens=limit, temperature=temperature, **sampled, **choices)

    def _replies(
        self, asked: Sequence[Sequence[Prompt]], names: Sequence[str], jobs: Iterator[Job], progress: bool
    ) -> Iterator[tuple[int, list[Generation]]]:
        with progress_bar(total=sum(map(len, asked)), desc="replies", show=progress) as bar:
            for c, outputs in self._vllm.run(jobs, on_reply=bar.update):
                yield c, [self._generation(prompt, names[c], output) for prompt, output in zip(asked[c], outputs, strict=True)]

    def _generation(self, prompt: Prompt, condition: str, output: Any) -> Generation:
        ids = tuple(output.token_ids)
        truncated = ids[-1] not in self._ends
        ids = ids if truncated else ids[:-1]
        reply = str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
        return Generation(prompt=prompt, condition=condition, reply=reply, reply_ids=ids, truncated=truncated)


def _config_of(source: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load a model from {source!r}: expected an embedded name, a folder with config.json, or a hub id that you can reach. "
            f"transformers says: {error}"
        ) from error


def _end_tokens(source: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token id that ends a reply; see `end_tokens`."""
    try:
        configured = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:
        configured = GenerationConfig.from_model_config(config).eos_token_id
    return end_tokens(tokenizer, configured)


def _seed(*parts: object) -> int:
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16)


def _logprobs(output: Any) -> dict[int, float]:
    return {token: entry.logprob for token, entry in output.logprobs[0].items()}


def _distance(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """Distance of the log-probabilities of the three likeliest tokens of ``one`` from those in ``other`` (20 likeliest tokens each)."""
    top = sorted(one, key=one.__getitem__, reverse=True)[:3]
    distance = float(np.max([abs(one[token] - other.get(token, -np.inf)) for token in top]))
    return np.inf if np.isnan(distance) else distance
