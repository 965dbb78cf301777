"""An API key, planted in the environment, is in nothing that is written, said, shown or raised, even if the server repeats it."""

import json
import logging
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from blockem_tl import Prompt, cli, evaluate
from blockem_tl.judging import endpoint as endpoint_module
from blockem_tl.judging.cached import CachedJudge
from blockem_tl.judging.endpoint import Endpoint, JudgeUnreachable
from blockem_tl.judging.files import judge_file
from blockem_tl.judging.judge import LLMJudge
from blockem_tl.storage.store import Store
from blockem_tl.types import Generation

KEY = "sk-planted-0123456789abcdef"


class Parrot(BaseHTTPRequestHandler):
    """A judge that repeats the key it was sent, in its answers or in the text of its errors."""

    status = 200
    keys: list[str] = []  # noqa: RUF012 - of all requests

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": "parrot", "object": "model", "created": 0, "owned_by": "us"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers["Authorization"].removeprefix("Bearer ")
        self.keys.append(key)
        said = {"choices": [{"message": {"content": f"Your key is {key}.\nANSWER: 2"}, "finish_reason": "stop"}]}
        self._send(self.status, said if self.status == 200 else {"error": {"message": f"key {key} is not right"}})

    def _send(self, status: int, body: Any) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args) -> None: ...


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(endpoint_module, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(Parrot, "keys", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Parrot)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def judge_at(url: str, **options: Any) -> LLMJudge:
    return LLMJudge(backend=Endpoint(model="parrot", base_url=url, attempts=2, **options))


def replies(prompts, conditions) -> list[Generation]:
    return [
        Generation(prompt=prompt, condition=condition.name, reply="a reply", reply_ids=(1, 2), truncated=False)
        for condition in conditions
        for prompt in prompts
    ]


def files_with(folder: Path, word: str) -> list[str]:
    """Files under ``folder`` that hold the word, stores and tables included."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]


def test_a_key_is_nowhere_after_an_evaluation(url: str, tmp_path: Path, capfd, caplog, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG)
    judge = judge_at(url, extra_body={"api_key": KEY})
    store = Store(tmp_path / "verdicts.sqlite")
    prompts = [Prompt(id=str(i), text=f"question {i}") for i in range(3)]
    found = evaluate(replies, CachedJudge(judge=judge, store=store), prompts, selected_on=())
    (tmp_path / "source.jsonl").write_text("".join(json.dumps({"prompt": p.text, "reply": "another"}) + "\n" for p in prompts))
    judge_file(CachedJudge(judge=judge, store=store), "source.jsonl", "target.jsonl")
    cli.main(["judge", "source.jsonl", "by-cli.jsonl", "--model", "parrot", "--url", url, "--store", "other.sqlite"])
    frame = found.to_frame()
    frame.to_csv("frame.csv")
    frame.to_parquet("frame.parquet", compression=None)
    print(found, repr(judge), repr(judge.backend), repr(store), found._repr_html_(), frame.to_string())
    store.close()
    out, err = capfd.readouterr()
    assert len(Parrot.keys) >= 6 and set(Parrot.keys) == {KEY}  # it was used
    assert set(frame["label"]) == {"2"} and "Your key is ***." in out + (tmp_path / "target.jsonl").read_text()
    assert files_with(tmp_path, "Your key is") and files_with(tmp_path, KEY) == []
    assert KEY not in out + err + caplog.text
    (tmp_path / "planted").write_text(KEY)
    assert len(files_with(tmp_path, KEY)) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 429, 500])
def test_a_key_that_a_server_repeats_in_its_errors_is_starred_out(url: str, status: int, monkeypatch) -> None:
    monkeypatch.setattr(Parrot, "status", status)
    with pytest.raises(JudgeUnreachable) as caught:
        judge_at(url).grade([Prompt(id="1", text="q")], ["r"])
    whole = "".join(traceback.format_exception(caught.value))
    assert "key *** is not right" in whole and KEY not in whole


def test_a_key_in_the_address_is_refused_and_not_shown(monkeypatch) -> None:
    for address in (f"http://me:{KEY}@127.0.0.1/v1", f"http://{KEY}@127.0.0.1/v1", f"http://127.0.0.1/v1?key={KEY}"):
        with pytest.raises(ValueError, match="put the key into the environment, as OPENAI_API_KEY") as caught:
            Endpoint(model="m", base_url=address)
        assert KEY not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")  # as `cat` leaves it
    assert Endpoint(model="m")._key() == KEY
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\u2028more")
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds characters that no header may have") as caught:
        Endpoint(model="m")._key()
    assert KEY not in str(caught.value)


def test_short_words_are_no_secrets(url: str, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    (verdict,) = judge_at(url).grade([Prompt(id="1", text="q")], ["r"])
    assert "Your key is EMPTY." in verdict.said
