"""A judging model behind an OpenAI-compatible address: a vLLM server, or any provider."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import urlsplit

from blockem_tl.judging.backend import Completion, NoLogprobs, Request, completion_of, label_schema
from blockem_tl.judging.threads import Pace, in_threads

_NO_KEY = "none"
_SECRET = 8  # characters of a key at least; "EMPTY" and the like are no secrets, and may be a part of an answer
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0  # seconds before a malformed body is asked for again; the client waits as long after its errors


class JudgeUnreachable(ConnectionError):  # noqa: N818 - reads as what happened, like HookNotFired
    """The judge's endpoint gave no usable answer, retries included. Verdicts already in the store are kept."""


class _MalformedError(Exception):
    """HTTP said OK, but the body is no completion."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A judging model at ``base_url``; implements `Backend`.

    concurrency: requests under way at once, each in a thread of its own.  timeout: seconds for one try.  attempts: tries per request.
    per_minute: rate limit, tries included.  choices: how a forced choice is asked for: "vllm" (structured_outputs) or "json" (a JSON
    schema with an enum, which other providers know).  extra_body: sent along as it is.

    For providers that refuse what is usual: limit_name: the name of the token limit.  temperature: None leaves it out.
    alternatives: most alternatives to ask for at a token (a score rubric wants 20; OpenAI takes 20, others 5 or none).

    The openai client tries again after the errors 408, 409, 429 and 5xx, dropped connections and timeouts. It waits as long as the
    server's Retry-After says, or else 0.5 s, doubling up to 8 s. Bodies that are no completion are asked for again as often.

    The key is read from ``api_key_variable`` in the environment; servers that need none ignore it. It is nowhere written: what a server
    repeats of it is starred out, and an address with a name and password or a query is refused. ``extra_body`` is not shown.
    """

    model: str
    base_url: str = "http://127.0.0.1:8000/v1"
    concurrency: int = 32
    timeout: float = 120.0
    attempts: int = 6
    per_minute: float | None = None
    choices: Literal["vllm", "json"] = "vllm"
    api_key_variable: str = "OPENAI_API_KEY"
    extra_body: dict[str, Any] = field(default_factory=dict, repr=False)
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    temperature: float | None = 0.0
    alternatives: int = 20

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.attempts < 1 or self.timeout <= 0 or (self.per_minute is not None and self.per_minute <= 0):
            raise ValueError("endpoint: expected concurrency and attempts >= 1, and timeout and per_minute above 0")
        if not self.model or not self.base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"endpoint: expected a model and a base_url with http:// or https://, got {self.model!r} and {self.base_url!r}"
            )
        address = urlsplit(self.base_url)
        if "@" in address.netloc or address.query or address.fragment:
            raise ValueError(
                f"endpoint: expected an address without a password or a query, got one at {address.hostname}: put the key into the "
                f"environment, as {self.api_key_variable}"
            )
        if self.choices not in ("vllm", "json") or self.limit_name not in ("max_tokens", "max_completion_tokens"):
            raise ValueError(f"endpoint: unknown choices {self.choices!r} or limit_name {self.limit_name!r}; see the documentation")
        if self.alternatives < 1:
            raise ValueError(f"endpoint: expected alternatives >= 1, got {self.alternatives}; rubrics with labels need none")
        _openai()

    @property
    def name(self) -> str:
        """The model's name, under which its verdicts are stored."""
        return self.model

    def check(self) -> None:
        """Ask which models are served. Raises JudgeUnreachable if nobody answers, ValueError if the model is not among them."""
        openai = _openai()
        try:
            with self._client(min(self.timeout, 10.0), retries=1) as client:
                served = [model.id for model in client.models.list()]
        except (openai.APIError, json.JSONDecodeError) as error:
            raise self._unreachable(error) from error
        if served and self.model not in served:
            raise ValueError(f"{self.base_url} serves {served}, expected {self.model!r}: name a model that is served there")

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """Ask them all, ``concurrency`` at a time.

        A request that the endpoint refuses for good (too long, filtered), or answers with a body that is no completion again and again,
        comes back as ``refused``, if it answers a harmless one of the same kind.

        Raises:
            ValueError: log-probabilities are needed, and the endpoint returns none.
            JudgeUnreachable: a request fails in any other way, retries included. What was under way then is still yielded.
        """
        with self._client(self.timeout, retries=self.attempts - 1) as client:
            yield from in_threads(requests, lambda request: self._ask(client, request), threads=self.concurrency)

    def _client(self, timeout: float, *, retries: int) -> Any:
        """An openai client that keeps the pace, its own retries included, and never sees its key in an answer."""
        openai, pace, key = _openai(), Pace(self.per_minute), self._key()

        def without_key(response: Any) -> None:
            if (body := response.read()) and key.encode() in body:
                response._content = body.replace(key.encode(), b"***")  # an error's text would be logged, an answer stored

        hooks = {"request": [lambda _: pace.turn()], "response": [without_key] if len(key) >= _SECRET else []}
        http = openai.DefaultHttpxClient(event_hooks=hooks)
        return openai.OpenAI(base_url=self.base_url, api_key=key, timeout=timeout, max_retries=retries, http_client=http)

    def _ask(self, client: Any, request: Request) -> Completion:
        openai = _openai()
        try:
            try:
                return self._answer(client, request)
            except UnicodeEncodeError as error:
                return Completion(text="", refused=f"the reply is no text that can be sent: {error}")
            except (openai.BadRequestError, openai.UnprocessableEntityError, _MalformedError) as error:
                self._answer(client, replace(request, turns=(("user", "Write the number 1."),)))  # raises if it is how we ask
                return Completion(text="", refused=f"{type(error).__name__}: {str(error)[:300]}")
        except (openai.APIError, _MalformedError) as error:
            raise self._unreachable(error, request) from error

    def _answer(self, client: Any, request: Request) -> Completion:
        """The completion. Tries again if the body is none, which the client takes for an answer."""
        for attempt in range(self.attempts):
            answer = client.chat.completions.with_raw_response.create(**self._arguments(request))
            try:
                return _read(answer.content, request)
            except _MalformedError:
                if attempt + 1 == self.attempts:
                    raise
            time.sleep(min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT))
        raise AssertionError("the last attempt returns or raises")

    def _key(self) -> str:
        key = os.environ.get(self.api_key_variable, "").strip() or _NO_KEY
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"the key in {self.api_key_variable} holds characters that no header may have: set it anew")
        return key

    def _arguments(self, request: Request) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": role, "content": text} for role, text in request.turns],
            self.limit_name: request.max_tokens,
            **({} if self.temperature is None else {"temperature": self.temperature}),
        }
        extra = dict(self.extra_body)
        if request.alternatives:
            arguments |= {"logprobs": True, "top_logprobs": min(request.alternatives, self.alternatives)}
        if request.choices and self.choices == "vllm":
            extra["structured_outputs"] = {"choice": list(request.choices)}
        elif request.choices:
            arguments["response_format"] = _choice_schema(request.choices)
        return {**arguments, "extra_body": extra} if extra else arguments

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


def _read(body: bytes, request: Request) -> Completion:
    """The completion in a response. Raises _MalformedError if the body is none (proxies answer 200 with anything)."""
    try:
        choice = json.loads(body)["choices"][0]
        text, why = choice["message"]["content"] or "", str(choice.get("finish_reason") or "")
        if why == "content_filter" or (not text and choice["message"].get("refusal")):
            return Completion(text="", refused=f"{why or 'refusal'}: {choice['message'].get('refusal') or 'no words'}")
        if not isinstance(text, str):
            raise TypeError(f"expected text, got {text!r}")
        tokens = (choice.get("logprobs") or {}).get("content") if request.alternatives else None
        return completion_of(text, request, cut=why == "length", tokens=tokens)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, NoLogprobs):
            raise
        raise _MalformedError(f"the body is no chat completion: {body[:200]!r}") from error


def _choice_schema(choices: tuple[str, ...]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": label_schema(choices)}}


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ImportError('judging through an endpoint needs the openai client: pip install "blockem-tl[judge]"') from error
    return openai
