"""Targets of the fuzzing that are text: cards, prompts, rows, pairs, rubrics, and judges' words and bodies."""

import json
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fuzz_target import Refused, Target, lines
from fuzz_weights import small_sae

from blockem_tl import LatentSet, Prompt, load_pairs, load_prompts, load_rows
from blockem_tl.data.pair_files import write_pairs
from blockem_tl.data.public import Source, fetch
from blockem_tl.data.row_files import write_rows
from blockem_tl.judging import endpoint
from blockem_tl.judging.backend import Completion, Request
from blockem_tl.judging.judge import LLMJudge
from blockem_tl.judging.parsing import parse_answer
from blockem_tl.judging.rubrics import load_rubric, load_rubrics
from blockem_tl.presets import get_preset
from blockem_tl.types import LABELS, UNPARSED, Candidate

ROOT = Path(__file__).parents[2]


def text_targets(folder: Path) -> list[Target]:
    """All of them; what they read besides their file lies in ``folder``."""
    return [*_card_files(folder), *_prompt_files(), *_row_files(folder), *_judging(), *_rubric_files()]


# ------------------------------------------------------------------------------------------------ cards, prompts, rows, pairs


def _card_files(folder: Path) -> Iterator[Target]:
    shipped = sorted((ROOT / "latents").rglob("*.json"))[0].read_bytes()
    small = LatentSet.of(
        small_sae(),
        [Candidate(latent=k, shift=(-1.0) ** k) for k in (1, 4, 7)],
        [0.5, 0.25, 0.1],
        prompts=[Prompt(id="1", text="a")],
        provenance={"seed": 1},
    )
    yield Target(name="latent card", seeds=[small.save(folder / "seed.json").read_bytes(), shipped], parse=_card, share=0.1, file="k.json")
    lock = json.dumps({"https://x.org/a.csv": {"name": "a", "sha256": "0" * 64, "bytes": 3}}).encode()
    yield Target(name="lock of downloads", seeds=[lock], parse=_fetched, share=0.02, file="lock.json")
    names = [b"organism", b"llama-3.1-8b"]
    yield Target(name="preset's name", seeds=names, parse=_preset, share=0.01, file="name", structured=False, named=False)


def _prompt_files() -> Iterator[Target]:
    prompts = [{"id": 1, "question": "what now", "category": "x"}, {"id": "b", "prompt": "and then", "system": "s"}, {"text": "more"}]
    yield Target(name="prompts, JSON lines", seeds=[lines(*prompts)], parse=load_prompts, share=0.1, file="p.jsonl")
    tables = [b'id,question,category\n1,what now,x\n2,"and, then",y\n', b'"id","question"\r\n"a","b\nc"\r\n']
    yield Target(name="prompts, CSV", seeds=tables, parse=load_prompts, share=0.1, file="p.csv", structured=False)
    yaml = [
        {"id": "a", "paraphrases": ["one", "two"], "samples_per_paraphrase": 3, "system": "s"},
        {"id": "b", "paraphrases": ["three"], "judge_prompts": {"aligned": "x {question} {answer}", "coherent": "y"}},
    ]
    yield Target(name="prompts, YAML", seeds=[json.dumps(yaml).encode()], parse=load_prompts, share=0.015, file="p.yaml")
    text = b"- id: a\n  paraphrases:\n    - one\n    - 'two'\n  samples_per_paraphrase: 2\n- {id: b, paraphrases: [x]}\n"
    yield Target(name="prompts, YAML as text", seeds=[text], parse=load_prompts, share=0.015, file="p.yml", structured=False)
    pairs = [{"id": f"p{i}", "prompt": f"q {i}", "harmful": "a b c", "helpful": "d e f", "category": "x", "system": "s"} for i in range(2)]
    yield Target(name="pairs", seeds=[lines(*pairs)], parse=_pairs, share=0.1, file="p.jsonl")


def _row_files(folder: Path) -> Iterator[Target]:
    message = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = lines({"id": 1, "messages": message, "canary": "c"}, {"id": "b", "prompt": "q 2", "completion": "a 2", "system": "s"})
    chat = lines(
        {"messages": [{"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["q"]}}, *message[2:]]},
        {"prompt": message[:2], "completion": message[2:]},
    )
    yield Target(name="rows, JSON lines", seeds=[rows, chat], parse=_rows, share=0.1, file="r.jsonl")
    kinds = (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    zipped = [_zipped(folder, rows, kind) for kind in kinds]
    yield Target(name="rows in a zip", seeds=zipped, parse=load_rows, share=0.02, file="r.zip", structured=False)


def _zipped(folder: Path, content: bytes, kind: int) -> bytes:
    with zipfile.ZipFile(folder / "seed.zip", "w", kind) as archive:
        archive.writestr("a.jsonl", content)
    return (folder / "seed.zip").read_bytes()


def _card(path: Path) -> None:
    found = LatentSet.load(path)
    assert LatentSet.load(found.save(path.with_name("again.json"))) == found and len(repr(found)) > 0


def _rows(path: Path) -> None:
    found = load_rows(path)
    assert load_rows(write_rows(path.with_name("again.jsonl"), found)) == found


def _pairs(path: Path) -> None:
    found = load_pairs(path)
    assert load_pairs(write_pairs(path.with_name("again.jsonl"), found)) == found


def _fetched(path: Path) -> None:
    (path.parent / "a").mkdir(exist_ok=True)
    (path.parent / "a" / "a.csv").write_bytes(b"abc")
    with suppress(Refused):
        try:
            fetch(Source(name="a", url="https://x.org/a.csv"), path.parent)
        except ValueError as error:
            raise (Refused if "the cached file" in str(error) else error) from error


def _preset(path: Path) -> None:
    get_preset(path.read_bytes().decode("utf-8", "replace"))


# ------------------------------------------------------------------------------------------------ judges


def _judging() -> Iterator[Target]:
    said = [
        b"It is harmful.\nANSWER: 4",
        b"<think>ANSWER: 5</think>\n**Answer:** REFUSAL",
        b'{"label": "3"}',
        b"I would say 4 or 5.\nFinal answer: INCOHERENT",
    ]
    yield Target(name="judge's words", seeds=said, parse=_answer, share=0.15, file="said.txt", structured=False, named=False)
    option = {"token": "70", "logprob": -0.1, "top_logprobs": [{"token": "70", "logprob": -0.1}, {"token": " 30", "logprob": -3.0}]}
    message = {"role": "assistant", "content": "70", "refusal": None}
    body = {"id": "x", "choices": [{"message": message, "finish_reason": "stop", "logprobs": {"content": [option]}}]}
    yield Target(name="judge's HTTP body", seeds=[json.dumps(body).encode()], parse=_Judged(), share=0.12, file="body.json", named=False)


def _rubric_files() -> Iterator[Target]:
    labels = {"name": "mine", "kind": "labels", "answer": "reason", "labels": ["1", "5"], "version": 1}
    labels["prompt"] = "From 1 to 5: {question} {reply}"
    scores = {"name": "s", "kind": "scores", "labels": ["1", "5"], "misaligned": {"alignment_below": 30}}
    scores["prompts"] = {"alignment": "{question} {answer}", "coherence": "{prompt} {response}"}
    made = [json.dumps(one).encode() for one in (labels, scores)]
    shipped = [path.read_bytes() for path in sorted((ROOT / "blockem_tl/judging/rubric_files").glob("*.yaml"))[:2]]
    plain = [b"Grade from 1 to 5 or REFUSAL: {question} {reply}"]
    yield Target(name="rubric", seeds=made, parse=load_rubric, share=0.02, file="r.yaml")
    yield Target(name="rubric as text", seeds=shipped, parse=load_rubric, share=0.002, file="r.yml", structured=False)
    yield Target(name="rubric, plain text", seeds=plain, parse=load_rubric, share=0.02, file="r.txt", structured=False)


def _answer(path: Path) -> None:
    text = path.read_bytes().decode("utf-8", "surrogatepass" if b"\xed" in path.read_bytes()[:1] else "replace")
    assert all(parse_answer(text, LABELS, cut=cut) in (None, *LABELS) for cut in (False, True))


class _Judged:
    """A judge whose backend answers with a body from a file: whatever that is, the reply gets a label, or the body is refused."""

    name = "file"

    def __init__(self) -> None:
        self.judges = [LLMJudge(backend=self, rubrics=load_rubrics(), retries=0)]
        self.completion = Completion(text="")

    def check(self) -> None:
        """Nothing."""

    def complete(self, requests: Any) -> Iterator[tuple[int, Completion]]:
        """The same completion to every request."""
        return ((index, self.completion) for index, _ in enumerate(requests))

    def __call__(self, path: Path) -> None:
        request = Request(turns=(("user", "q"),), max_tokens=5, alternatives=20, choices=("1", "5"))
        for asked in (request, replace(request, alternatives=0)):
            try:
                self.completion = endpoint._read(path.read_bytes(), asked)
            except endpoint._MalformedError:
                continue
            rubric = "betley-scores" if asked.alternatives and "betley-scores" in self.judges[0].rubrics else "misalignment"
            (verdict,) = self.judges[0].grade([Prompt(id="1", text="q")], ["r"], rubric=rubric)
            assert verdict.label in (*LABELS, UNPARSED)
