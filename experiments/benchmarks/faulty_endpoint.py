"""A loopback OpenAI-compatible endpoint that misbehaves on purpose: late answers, 429, 500, dropped connections, bodies that are no JSON.

    python experiments/benchmarks/faulty_endpoint.py --latency 0.05 --errors 0.05

It prints its port, serves at most ``--seconds``, and answers ``ANSWER: k`` with k in 1..5 that depends on the prompt alone
(`label_of`), so every verdict can be checked. GET /stats returns how often it did what, and how many requests it had at once.
"""

import asyncio
import json
import random
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import tyro

FAULTS = ("429", "500", "dropped", "malformed")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """latency: seconds before every answer.  errors: share of requests that go wrong.  fault: the only way to go wrong, any by default.

    silent: share of answers without a label.  retry_after: seconds to wait, said with every 429.
    no_logprobs: refuse (400) requests for log-probabilities. Prompts with the word FILTERED are refused in any case.
    """

    latency: float = 0.05
    errors: float = 0.05
    fault: Literal["any", "429", "500", "dropped", "malformed"] = "any"
    silent: float = 0.0
    retry_after: float | None = None
    seed: int = 0
    seconds: float = 600.0
    no_logprobs: bool = False
    model: str = "faulty"


def label_of(prompt: str) -> str:
    """The label that this endpoint gives to a prompt."""
    return str(1 + zlib.crc32(prompt.encode()) % 5)


class Endpoint:
    """Counts what it does; faults are drawn from the seed, one draw a request."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.random, self.counts = settings, random.Random(settings.seed), Counter[str]()
        self.under_way = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One kept-alive connection."""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:])}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if not await self.answer(lines[0].split()[1], body, writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> bool:
        """Write one response; False if the connection is to be dropped."""
        if path.endswith("/models"):
            send(writer, 200, json.dumps({"object": "list", "data": [{"id": self.settings.model, "object": "model"}]}))
            return True
        if path.endswith("/stats"):
            send(writer, 200, json.dumps(self.counts))
            return True
        faults = FAULTS if self.settings.fault == "any" else (self.settings.fault,)
        fault = self.random.choice(faults) if self.random.random() < self.settings.errors else "answered"
        self.counts[fault] += 1
        self.under_way += 1
        self.counts["at_once"] = max(self.counts["at_once"], self.under_way)
        await asyncio.sleep(self.settings.latency)
        self.under_way -= 1
        if fault == "dropped":
            return False
        if fault in ("429", "500"):
            wait = self.settings.retry_after if fault == "429" else None
            send(writer, int(fault), json.dumps({"error": {"message": "as told"}}), *([] if wait is None else [f"Retry-After: {wait}"]))
            return True
        request = json.loads(body)
        if "FILTERED" in request["messages"][0]["content"] or (self.settings.no_logprobs and "logprobs" in request):
            send(writer, 400, json.dumps({"error": {"message": "refused for good"}}))
            return True
        completion = self.completion(request)
        send(writer, 200, completion[: len(completion) // 2] if fault == "malformed" else completion)
        return True

    def completion(self, request: dict[str, Any]) -> str:
        """A chat completion naming the first message's label, or, for the chosen share of prompts, never any."""
        prompt = request["messages"][0]["content"]
        silent = zlib.crc32(b"silent" + prompt.encode()) % 1000 < 1000 * self.settings.silent
        text = "I cannot decide." if silent else f"I thought about it.\nANSWER: {label_of(prompt)}"
        if "response_format" in request:
            text = json.dumps({"label": label_of(prompt)})
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        return json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": self.settings.model, "choices": [choice]})


def send(writer: asyncio.StreamWriter, status: int, body: str, *headers: str) -> None:
    """Write one HTTP response."""
    payload = body.encode()
    head = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(payload)}", *headers]
    writer.write("\r\n".join([*head, "", ""]).encode() + payload)


async def main(settings: Settings) -> None:
    """Serve on a free loopback port until the time is over."""
    server = await asyncio.start_server(Endpoint(settings).serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.sleep(settings.seconds)


if __name__ == "__main__":
    asyncio.run(main(tyro.cli(Settings, description=__doc__)))
