"""A judging model inside this process, through vLLM."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from blockem_tl.judging.backend import Completion, Request

_BATCH = 512  # requests that vLLM schedules together


class LocalVLLM:
    """vLLM in process; implements `Backend`. Prefix caching is on: a long rubric is computed once.

    Args:
        model: folder or hub id.
        engine: passed to ``vllm.LLM``, for instance ``tensor_parallel_size=4``.
    """

    def __init__(self, model: str, **engine: Any) -> None:
        try:
            import vllm  # pyright: ignore[reportMissingImports] - lives in an environment of its own
            from vllm.sampling_params import StructuredOutputsParams  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                'judging in process needs vLLM: pip install "blockem-tl[vllm]" on a GPU machine, '
                "or `make install-vllm` for the CPU build in an environment of its own"
            ) from error
        self.name = model
        self._sampling, self._structured = vllm.SamplingParams, StructuredOutputsParams
        self._llm = vllm.LLM(model=model, **{"enable_prefix_caching": True, **engine})

    def check(self) -> None:
        """Nothing to check: the model was loaded when this was made."""

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """Answer them all, in batches."""
        source = enumerate(requests)
        while batch := list(itertools.islice(source, _BATCH)):
            conversations = [[{"role": role, "content": text} for role, text in request.turns] for _, request in batch]
            outputs = self._llm.chat(conversations, [self._parameters(request) for _, request in batch], use_tqdm=False)
            for (index, request), output in zip(batch, outputs, strict=True):
                yield index, _completion(output.outputs[0], request)

    def _parameters(self, request: Request) -> Any:
        return self._sampling(
            temperature=0.0,
            max_tokens=request.max_tokens,
            logprobs=request.alternatives or None,
            structured_outputs=self._structured(choice=list(request.choices)) if request.choices else None,
        )


def _completion(output: Any, request: Request) -> Completion:
    cut = output.finish_reason == "length"
    spoken = [i for i, options in enumerate(output.logprobs or []) if options[output.token_ids[i]].decoded_token.strip()]
    if not request.alternatives or not spoken:
        return Completion(text=output.text, cut=cut)
    options, token = output.logprobs[spoken[0]], output.token_ids[spoken[0]]
    ranked = sorted(options.values(), key=lambda option: -option.logprob)[: request.alternatives]
    return Completion(
        text=output.text,
        first=options[token].decoded_token,
        alternatives=tuple((option.decoded_token, option.logprob) for option in ranked),
        cut=cut,
    )
