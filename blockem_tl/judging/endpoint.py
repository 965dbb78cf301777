"""A judging model behind an OpenAI-compatible address: a vLLM server, or any provider."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential

from blockem_tl.judging.backend import Completion, Request
from blockem_tl.judging.concurrent import Pace, in_window


class JudgeUnreachable(ConnectionError):  # noqa: N818 - reads as what happened, like HookNotFired
    """The judge's endpoint gave no usable answer, retries included. Verdicts already in the store are kept."""


class _MalformedError(Exception):
    """HTTP said OK, but the body is no completion."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A judging model at ``base_url``; implements `Backend`.

    concurrency: requests under way at once.  timeout: seconds for one request.  attempts: tries per request, with random exponential
    waits in between (the server's Retry-After where it says one); errors 408, 409, 429 and 5xx, dropped connections, timeouts and
    malformed bodies are tried again.  per_minute: rate limit.  choices: how a forced choice is asked for: "vllm" (structured_outputs)
    or "json" (a JSON schema with an enum, which other providers know).  extra_body: sent along as it is.

    The key is read from ``api_key_variable`` in the environment; servers that need none ignore it.
    """

    model: str
    base_url: str = "http://127.0.0.1:8000/v1"
    concurrency: int = 32
    timeout: float = 120.0
    attempts: int = 6
    first_wait: float = 0.5
    longest_wait: float = 30.0
    per_minute: float | None = None
    choices: Literal["vllm", "json"] = "vllm"
    api_key_variable: str = "OPENAI_API_KEY"
    extra_body: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.attempts < 1 or self.timeout <= 0 or (self.per_minute is not None and self.per_minute <= 0):
            raise ValueError("endpoint: expected concurrency and attempts >= 1, and timeout and per_minute above 0")
        _openai()

    @property
    def name(self) -> str:
        return self.model

    def check(self) -> None:
        """Ask which models are served. Raises JudgeUnreachable where nobody answers, ValueError where the model is not among them."""
        openai = _openai()
        client = openai.OpenAI(base_url=self.base_url, api_key=self._key(), timeout=min(self.timeout, 10.0), max_retries=1)
        try:
            with client:
                served = [model.id for model in client.models.list()]
        except (openai.APIError, json.JSONDecodeError) as error:
            raise self._unreachable(error) from error
        if served and self.model not in served:
            raise ValueError(f"{self.base_url} serves {served}, expected {self.model!r}: name a model that is served there")

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """Ask them all, ``concurrency`` at a time.

        A request that the endpoint refuses for good (too long, filtered) comes back as ``refused``, if it answers a harmless one of the
        same kind.

        Raises:
            JudgeUnreachable: a request fails in any other way, retries included.
        """
        # Twice the concurrency: while some jobs are prepared, read or wait before trying again, others keep the connections busy.
        yield from in_window(requests, self._ask, resource=self._client, window=2 * self.concurrency)

    async def _ask(self, client: Any, request: Request) -> Completion:
        openai = _openai()
        try:
            return await self._try(client, request)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            refused = f"{type(error).__name__}: {str(error)[:300]}"
        try:
            await self._try(client, replace(request, turns=(("user", "Write the number 1."),)))
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise self._unreachable(error, request) from error  # not this request, but how we ask
        return Completion(text="", refused=refused)

    async def _try(self, client: Any, request: Request) -> Completion:
        openai = _openai()
        retrying = AsyncRetrying(retry=retry_if_exception(_passing), wait=self._wait, stop=stop_after_attempt(self.attempts), reraise=True)
        try:
            async for attempt in retrying:
                with attempt:
                    return _read(await client.chat.completions.create(**self._arguments(request)), request)
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            raise
        except (openai.APIError, _MalformedError, json.JSONDecodeError) as error:
            raise self._unreachable(error, request) from error
        raise AssertionError("tenacity returns or raises")

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[Any]:
        openai = _openai()
        slots, pace = asyncio.Semaphore(self.concurrency), Pace(self.per_minute)

        class Limited(openai.DefaultAsyncHttpxClient):
            """Holds a slot from the first byte sent to the last one read, and at no other time."""

            async def send(self, *args: Any, **kwargs: Any) -> Any:
                async with slots:
                    await pace.turn()
                    return await super().send(*args, **kwargs)

        client = openai.AsyncOpenAI(
            base_url=self.base_url, api_key=self._key(), timeout=self.timeout, max_retries=0, http_client=Limited(timeout=self.timeout)
        )
        try:
            yield client
        finally:
            await client.close()

    def _key(self) -> str:
        return os.environ.get(self.api_key_variable) or "none"

    def _arguments(self, request: Request) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": role, "content": text} for role, text in request.turns],
            "temperature": 0.0,
            "max_tokens": request.max_tokens,
        }
        extra = dict(self.extra_body)
        if request.alternatives:
            arguments |= {"logprobs": True, "top_logprobs": request.alternatives}
        if request.choices and self.choices == "vllm":
            extra["structured_outputs"] = {"choice": list(request.choices)}
        elif request.choices:
            arguments["response_format"] = _choice_schema(request.choices)
        return {**arguments, "extra_body": extra} if extra else arguments

    def _wait(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
        if asked.replace(".", "", 1).isdigit():
            return min(float(asked), self.longest_wait)
        return wait_random_exponential(multiplier=self.first_wait, max=self.longest_wait)(state)

    def _unreachable(self, error: Exception, request: Request | None = None) -> JudgeUnreachable:
        openai = _openai()
        if isinstance(error, (openai.APIConnectionError, openai.APITimeoutError)):
            port = self.base_url.split(":")[-1].split("/")[0]
            return JudgeUnreachable(
                f"no judge answers at {self.base_url} ({type(error).__name__}). Start one, for instance "
                f"`python -m vllm.entrypoints.openai.api_server --model {self.model} --host 127.0.0.1 --port {port}`, or correct the "
                "address. Verdicts already in the store are kept: run the same again to go on"
            )
        of = f" on the request that ends {request.turns[-1][1][-120:]!r}" if request else ""
        return JudgeUnreachable(
            f"the judge at {self.base_url} failed {self.attempts} times, or for good,{of}: {type(error).__name__}: {str(error)[:300]}. "
            "Verdicts already in the store are kept: run the same again to go on"
        )


def _passing(error: BaseException) -> bool:
    """Whether trying again may help."""
    openai = _openai()
    if isinstance(error, openai.APIStatusError):
        status = int(getattr(error, "status_code", 0))
        return status in (408, 409, 429) or status >= 500
    return isinstance(error, (openai.APIConnectionError, openai.APIResponseValidationError, _MalformedError, json.JSONDecodeError))


def _read(answer: Any, request: Request) -> Completion:
    """The completion in a response. Raises _MalformedError where the body is not one (proxies answer 200 with anything)."""
    try:
        choice = answer.choices[0]
        text = choice.message.content or ""
        tokens = choice.logprobs.content if request.alternatives else []
        first = tokens[0] if tokens else None
        if request.choices and text.lstrip().startswith("{"):
            text = json.loads(text)["label"]
        return Completion(
            text=text,
            first=first.token if first else "",
            alternatives=tuple((option.token, option.logprob) for option in first.top_logprobs) if first else (),
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise _MalformedError(f"expected a chat completion, got {str(answer)[:200]!r}") from error


def _choice_schema(choices: tuple[str, ...]) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {"label": {"type": "string", "enum": list(choices)}},
        "required": ["label"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ImportError('judging through an endpoint needs the openai client: pip install "blockem-tl[judge]"') from error
    return openai
