"""Downloads are whole and checked, or not there at all."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pooch
import pytest

from blockem_tl.data.prompt_files import load_prompts
from blockem_tl.data.public import Source, catalogue, fetch, find_source

CSV = 'id,question,category,canary\nc1,"Say, what now?",power,canary:1\nc2,"Two\nlines",deceit,canary:1\n'


class Server(BaseHTTPRequestHandler):
    body = CSV.encode()

    def do_GET(self) -> None:
        if self.path.endswith("missing.csv"):
            self.send_error(404)
            return
        body = self.body
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) * (2 if self.path.endswith("truncated.csv") else 1)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None: ...


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def source(address: str, file: str = "core.csv", sha256: str | None = None) -> Source:
    return Source(name="core", url=f"{address}/{file}", sha256=sha256)


def test_a_download_is_checked_and_cached(tmp_path: Path, address: str) -> None:
    right = hashlib.sha256(Server.body).hexdigest()
    path = fetch(source(address, sha256=right), tmp_path / "cache")
    assert load_prompts(path)[0].id == "c1" and path == tmp_path / "cache" / "core" / "core.csv"
    lock = json.loads((tmp_path / "cache" / "lock.json").read_text())
    assert lock == {f"{address}/core.csv": {"name": "core", "sha256": right, "bytes": len(Server.body)}}
    assert fetch(source("http://127.0.0.1:9", sha256=right), tmp_path / "cache") == path  # cached: nobody is asked
    with pytest.raises(ValueError, match=f"{address}/core.csv: .*do not use it unseen.*expected {'0' * 64} but got {right}"):
        fetch(source(address, sha256="0" * 64), tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())


def test_fetching_says_nothing_and_leaves_others_logs_alone(tmp_path: Path, address: str, caplog, monkeypatch) -> None:
    monkeypatch.setattr(pooch.get_logger(), "handlers", [caplog.handler])
    fetch(source(address), tmp_path / "ours")
    assert caplog.records == []
    pooch.retrieve(f"{address}/core.csv", None, fname="core.csv", path=tmp_path / "plain")
    assert caplog.records[0].message.startswith("Downloading data")  # pooch itself, as before


def test_the_first_download_locks_the_checksum(tmp_path: Path, address: str, monkeypatch) -> None:
    path = fetch(source(address), tmp_path)
    path.write_text("tampered")
    with pytest.raises(ValueError, match="the cached file .*expected SHA-256.*delete it"):
        fetch(source(address), tmp_path)
    path.unlink()
    monkeypatch.setattr(Server, "body", CSV.replace("power", "flower").encode())
    with pytest.raises(ValueError, match="public file was replaced, or the download altered"):
        fetch(source(address), tmp_path)
    assert not path.exists()


def test_a_file_put_there_by_hand_is_locked_too(tmp_path: Path) -> None:
    path = tmp_path / "core" / "core.csv"
    path.parent.mkdir()
    path.write_text(CSV)
    assert fetch(source("http://127.0.0.1:9"), tmp_path) == path
    path.write_text("tampered")
    with pytest.raises(ValueError, match="the cached file .*delete it"):
        fetch(source("http://127.0.0.1:9"), tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [("truncated.csv", "broke off .*bytes read.*run it again"), ("missing.csv", "404 .*missing.csv: was the file moved")],
)
def test_broken_downloads_leave_nothing(tmp_path: Path, address: str, file: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fetch(source(address, file), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unreachable_address_says_where_to_put_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="http://127.0.0.1:9/core.csv: cannot be reached.*by hand"):
        fetch(source("http://127.0.0.1:9"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_catalogue() -> None:
    assert {"core-misalignment", "extended-misalignment", "first-plot", "sft-finance-incorrect", "sft-insecure-code"} <= set(catalogue())
    assert find_source("sft-edu-incorrect-subtle").url.endswith("/datasets_password_locked/edu_incorrect_subtle.zip")
    assert len({entry.url for entry in catalogue().values()}) == len(catalogue()) and all("{" not in e.url for e in catalogue().values())
    assert all(entry.url.startswith("https://") and entry.what for entry in catalogue().values())
    pinned = {name for name, entry in catalogue().items() if entry.sha256}
    assert pinned == {"first-plot", "preregistered", "deception-factual", "deception-sit-aware"}
    assert all(re.fullmatch("[0-9a-f]{64}", find_source(name).sha256) for name in pinned)
    with pytest.raises(ValueError, match="unknown data 'cor'.*core-misalignment"):
        find_source("cor")
