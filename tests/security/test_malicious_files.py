"""Files that would run code, leave their folder or be altered on the way: refused, and nothing of theirs happens."""

import json
import os
import shutil
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from shared import EXAMPLES, SITES, sae_at
from transformers import AutoTokenizer

from blockem_tl import load_model, load_rows, load_sae
from blockem_tl.data.chat import encode_examples
from blockem_tl.data.public import Source, fetch
from blockem_tl.saes.rounds import Rounds


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What a payload makes if it runs."""
    return tmp_path / "it-ran"


def test_the_payload_would_run(tmp_path: Path, mark: Path) -> None:
    torch.save({"w": Payload(mark)}, tmp_path / "a.bin")
    with pytest.raises(Exception, match="weights_only|Unsupported"):
        torch.load(tmp_path / "a.bin", weights_only=True)
    assert not mark.exists()
    torch.load(tmp_path / "a.bin", weights_only=False)
    assert mark.exists()


def test_pickled_models_are_refused(tiny_folder: Path, tmp_path: Path, mark: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Payload(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="weights as safetensors.*Pickled weights"):
        load_model(folder, device="cpu")
    torch.save({"model.embed_tokens.weight": torch.zeros(64, 32)}, folder / "pytorch_model.bin")  # harmless ones too
    with pytest.raises(ValueError, match="Pickled weights"):
        load_model(folder, device="cpu")
    assert not mark.exists()


def test_a_model_s_own_code_never_runs(tiny_folder: Path, tmp_path: Path, mark: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps({**config, **own}))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Config: ...\nclass Model: ...\n")
    with pytest.raises(ValueError, match="code of a model's own are never loaded.*load the model with transformers and pass it"):
        load_model(folder, device="cpu")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**tokenizer, "tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.T", "own.T"]}})
    )
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="code"):
        load_model(folder, device="cpu")
    assert not mark.exists()


def test_pickled_adapters_are_refused(tiny, tmp_path: Path, mark: Path) -> None:
    tiny.add_adapter("mine", rank=2)
    folder = tiny.save_adapter(tmp_path / "adapter", "mine")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.w": Payload(mark)}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.bin, which is a pickle"):
        tiny.load_adapter(folder, "other")
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="expected tensors as safetensors"):
        tiny.load_adapter(folder, "other")
    assert not mark.exists() and tiny.adapters == ["mine"]


def test_pickled_saes_are_refused(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "sae"
    sae_at(SITES[0]).save_model(folder)
    for name in ("sae_weights.safetensors", "sae_weights.pt", "ae.pt"):
        (folder / "sae_weights.safetensors").unlink(missing_ok=True)
        torch.save({"W_enc": Payload(mark)}, folder / name)
        with pytest.raises(ValueError, match="the SAE's weights are broken"):
            load_sae(folder, device="cpu")
    assert not mark.exists()


def test_a_training_state_that_is_altered_is_refused(tmp_path: Path, mark: Path) -> None:
    """SAELens keeps its trainer's state with torch.save; it is read without unpickling."""

    class Trainer:
        class sae:  # noqa: N801
            load_weights_from_checkpoint = staticmethod(lambda folder: None)

        def load_trainer_state(self, folder: Path) -> None:
            torch.load(folder / "trainer_state.pt")

    rounds = Rounds(tmp_path / "out.training", {"site": "a"})
    last = tmp_path / "out.training" / "round-0"
    last.mkdir(parents=True)
    (last / "run.json").write_text(json.dumps({"site": "a"}))
    torch.save({"optimizer": Payload(mark)}, last / "trainer_state.pt")
    with pytest.raises(ValueError, match=r"out.training.*cannot be gone on from.*delete it"):
        rounds.restore(Trainer())
    assert not mark.exists()


def test_arrays_of_objects_are_refused(tmp_path: Path, mark: Path) -> None:
    np.save(tmp_path / "values.npy", np.array([Payload(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        np.load(tmp_path / "values.npy", mmap_mode="r")  # as base_latents does
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(tmp_path / "values.npy")
    assert not mark.exists()


TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.mkdir('it-ran') }}",
    "{{ messages.append({'role': 'user', 'content': 'more'}) }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_cannot_leave_their_sandbox(template: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert encode_examples(tokenizer, EXAMPLES[:1])
    tokenizer.chat_template += template
    with pytest.raises(ValueError, match="example '0': the chat template"):
        encode_examples(tokenizer, EXAMPLES[:1])
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ archives, downloads


@pytest.mark.parametrize("member", ["../../outside.jsonl", "/tmp/blockem-outside.jsonl", "a/../../outside.jsonl"])
def test_an_archive_writes_nothing_anywhere(member: str, tmp_path: Path) -> None:
    """Its members are read in memory, so their names lead nowhere."""
    folder = tmp_path / "deep" / "inside"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "rows.zip", "w") as archive:
        archive.writestr(member, json.dumps({"prompt": "q", "completion": "a"}))
    assert load_rows(folder / "rows.zip")[0].completion == "a"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [folder / "rows.zip"] and not Path(
        "/tmp/blockem-outside.jsonl"
    ).exists()


class Elsewhere(BaseHTTPRequestHandler):
    """Sends everybody on to the same server under a name that is not loopback's."""

    def do_GET(self) -> None:
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", f"http://0.0.0.0:{self.server.server_address[1]}/core.csv")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *args) -> None: ...


@pytest.fixture
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def test_downloads_come_over_https_alone(tmp_path: Path, port: int) -> None:
    assert fetch(Source(name="a", url=f"http://127.0.0.1:{port}/core.csv"), tmp_path / "good").read_bytes() == b"ok"
    for url in ("http://example.org/core.csv", "ftp://example.org/core.csv", "file:///etc/hostname", "http://127.0.0.1.example.org/a.csv"):
        with pytest.raises(ValueError, match=f"{url}: expected an address that begins with https://"):
            fetch(Source(name="a", url=url), tmp_path / "bad")
    with pytest.raises(ValueError, match=r"it leads to http://0.0.0.0:\d+/core.csv, which is not https: nothing was kept"):
        fetch(Source(name="a", url=f"http://127.0.0.1:{port}/moved.csv"), tmp_path / "bad")
    assert [path for path in (tmp_path / "bad").rglob("*") if path.is_file()] == []
