"""What the fuzzing found, mended by kind: each is refused by an error that names its file."""

import json
import lzma
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import SITES, sae_at, set_of
from transformers import AutoTokenizer

from blockem_tl import LatentSet, Prompt, finetune, load_prompts, load_rows, load_sae
from blockem_tl.data.chat import encode_prompts
from blockem_tl.data.corpora import corpus
from blockem_tl.data.public import Source, fetch
from blockem_tl.data.templates import pin_arguments
from blockem_tl.judging.rubrics import load_rubric
from blockem_tl.storage import files
from blockem_tl.storage.store import Store
from blockem_tl.training.checkpoints import load_run, restore_generators, restore_optimizer, trajectory
from blockem_tl.training.config import TrainingConfig
from blockem_tl.types import Example

HUGE = 10**400  # JSON's numbers have no end, and floats have


def changed(path: Path, **fields: object) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return path


@pytest.mark.parametrize(
    "fields", [{"shifts": [HUGE, 1, 1, 1]}, {"latents": [4]}, {"latents": [4, 4, 4, 4]}, {"d_sae": 5}, {"site": "\ud800"}]
)
def test_latent_cards(fields: dict, tmp_path: Path) -> None:
    path = set_of(sae_at(SITES[0])).save(tmp_path / "k.json")
    with pytest.raises(ValueError, match="k.json"):
        LatentSet.load(changed(path, **fields))


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
def test_numbers_that_no_file_could_be_written_with_again(number: str, tmp_path: Path) -> None:
    """Python reads 1e999 as infinity, here in a field that a card keeps without looking at it."""
    path = set_of(sae_at(SITES[0])).save(tmp_path / "k.json")
    card = json.loads(path.read_text())
    path.write_text(json.dumps({**card, "provenance": {"odd": 0.123}}).replace("0.123", number))
    with pytest.raises(ValueError, match="k.json.*no number"):
        LatentSet.load(path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b", "odd": 0.123}).replace("0.123", number))
    with pytest.raises(ValueError, match="rows.jsonl, line 1"):
        load_rows(tmp_path / "rows.jsonl")
    path.write_text(json.dumps({**card, "provenance": {"odd": 0.123}}))
    assert LatentSet.load(path).provenance["odd"] == 0.123


def test_half_a_surrogate_pair_is_no_text_in_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"whole": "\\ud83d\\ude00", "kept": "\\\\ud800"}')
    assert files.read_json(tmp_path / "a.json") == {"whole": "\U0001f600", "kept": "\\ud800"}
    (tmp_path / "a.json").write_text('{"half": "\\ud83d"}')
    with pytest.raises(ValueError, match="a.json"):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_STORED])
def test_archives_that_are_damaged_anywhere(kind: int, tmp_path: Path) -> None:
    """lzma's and bz2's errors, and offsets that lie before the file."""
    path = tmp_path / "r.zip"
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("a.jsonl", json.dumps({"prompt": "question " * 9, "completion": "a"}))
    assert len(load_rows(path)) == 1
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with suppress(ValueError):
            load_rows(path)
            refused -= 1
        refused += 1
        path.write_bytes(whole[:place])
        with pytest.raises(ValueError, match=r"r\.zip"):
            load_rows(path)
    assert refused > len(whole) / 3 and issubclass(lzma.LZMAError, Exception)
    with pytest.raises(FileNotFoundError):
        load_rows(tmp_path / "gone.zip")


def test_rows_whose_author_is_no_object(tmp_path: Path) -> None:
    for author in (True, "user", ["user"], 7):
        (tmp_path / "r.jsonl").write_text(json.dumps({"messages": [{"author": author, "content": "q"}]}))
        with pytest.raises(ValueError, match="r.jsonl, line 1: expected a message"):
            load_rows(tmp_path / "r.jsonl")


def test_corpora_whose_columns_are_no_texts() -> None:
    rows = datasets.Dataset.from_list([{"instruction": 5, "input": None, "output": "a"}])
    with pytest.raises(ValueError, match="row 1: expected texts as instruction and input"):
        corpus(rows)
    assert corpus(
        datasets.Dataset.from_list([{"instruction": "q", "input": " ", "output": "a"}, {"instruction": "", "input": "", "output": "a"}])
    ) == [Example(id="1", prompt="q", completion="a")]


@pytest.mark.parametrize("content", ["[]", "5", '{"https://x.org/a.csv": 3}'])
def test_locks_of_downloads(content: str, tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text(content)
    with pytest.raises(ValueError, match=r"lock.json: expected checksums by address"):
        fetch(Source(name="a", url="https://x.org/a.csv"), tmp_path)


RUBRIC = {"name": "mine", "labels": ["1", "5"], "prompt": "From 1 to 5: {question} {reply}"}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompts": 7},
        {"prompts": "text"},
        {"prompts": False},
        {"prompts": {"mine": 5}},
        {"prompt": 7},
        {"name": []},
        {"name": 5},
        {"labels": "15"},
        {"labels": {}},
        {"labels": ["8"]},
        {"kind": []},
        {"misaligned": "/"},
        {"misaligned": {"alignment_below": HUGE}},
        {"misaligned": {"alignment_below": "30"}},
        {"misaligned": {"below": 30}},
        {"5": 5},
    ],
)
def test_rubrics(fields: dict, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(RUBRIC))
    assert load_rubric(path).labels == ("1", "5")
    with pytest.raises(ValueError, match=r"r\.yaml: "):
        load_rubric(changed(path, **fields))
    path.with_suffix(".txt").write_text("no slots")
    with pytest.raises(ValueError, match=r"r\.txt: "):
        load_rubric(path.with_suffix(".txt"))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{n}: &{n} [{', '.join([f'*{b}'] * 9)}]\n" for b, n in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text", ["[" * 30_000, "{a: " * 30_000, BOMB, f"- id: a\n  paraphrases: [x]\n  system: {{{BOMB.replace(chr(10), ', ')}}}\n"]
)
def test_yaml_that_would_take_all_time_or_memory(text: str, tmp_path: Path) -> None:
    """Deep nesting, and aliases that stand for 9^9 values: printed whole in an error they would take gigabytes."""
    for name, read in (("p.yaml", load_prompts), ("r.yaml", load_rubric)):
        (tmp_path / name).write_text(text)
        start = time.process_time()
        with pytest.raises(ValueError, match=name) as caught:
            read(tmp_path / name)
        assert time.process_time() - start < 5 and len(str(caught.value)) < 1000


def test_stores_whose_pages_are_damaged(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    store.put({"a": 1})
    store.connection.execute("UPDATE entries SET value = '{'")
    for read in (lambda: store.get(["a"]), lambda: dict(store)):
        with pytest.raises(ValueError, match="s.sqlite: the store is damaged"):
            read()


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.fixture
def checkpoint(tiny, tmp_path: Path) -> Path:
    rows = [Example(id=str(i), prompt=f"w{i}", completion=f"w{i + 1} w{i + 2}") for i in range(8)]
    config = TrainingConfig(rank=2, alpha=4, batch_size=4, epochs=1)
    finetune(tiny, rows, config=config, adapter="tuned", checkpoints=tmp_path / "kept", save_every_epochs=1, progress=False)
    return tmp_path / "kept" / "epoch-1"


@pytest.mark.parametrize(
    "fields",
    [
        {"format": 2},
        {"history": []},
        {"history": "text"},
        {"history": [5]},
        {"history": [{"step": 1.0}]},
        {"history": [{"epoch": "1"}]},
        {"history": [{"epoch": HUGE}]},
        {"step": None},
        {"identity": 5},
        {"identity": {"rows": 5}},
    ],
)
def test_manifests_of_checkpoints(fields: dict, checkpoint: Path) -> None:
    assert load_run(checkpoint)["step"] == 2 and len(trajectory(checkpoint.parent)) == 1
    changed(checkpoint / "run.json", **fields)
    for read in (lambda: load_run(checkpoint), lambda: trajectory(checkpoint.parent)):
        with pytest.raises(ValueError, match="epoch-1/run.json: expected"):
            read()
    (checkpoint / "run.json").write_text("7")
    with pytest.raises(ValueError, match="epoch-1/run.json: expected"):
        load_run(checkpoint)


STATES = {
    "lost moments": lambda state: {n: t for n, t in state.items() if not n.endswith("exp_avg_sq")},
    "moments of another shape": lambda state: {n: t[:1] if n.endswith("exp_avg") else t for n, t in state.items()},
    "NaN": lambda state: {n: t * float("nan") if n.endswith("exp_avg") else t for n, t in state.items()},
    "no generator": lambda state: {n: t for n, t in state.items() if "generator" not in n},
    "half a generator": lambda state: {n: t[:9].clone() if "generator" in n else t for n, t in state.items()},
}


@pytest.mark.parametrize("name", STATES)
def test_states_of_training(name: str, checkpoint: Path, tiny) -> None:
    parameters = tiny.adapter_parameters("tuned")
    path = checkpoint / "training_state.safetensors"

    def restored() -> None:
        restore_optimizer(torch.optim.AdamW(parameters), checkpoint)
        restore_generators(checkpoint)

    restored()
    save_file(STATES[name](load_file(path)), path)
    with pytest.raises(ValueError, match="training_state.safetensors: expected"):
        restored()
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="training_state.safetensors: expected a training's state as safetensors"):
        restored()


# ------------------------------------------------------------------------------------------------ SAEs, adapters, templates


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": "x"},
        {"metadata": None},
        {"apply_b_dec_to_input": []},
        {"apply_b_dec_to_input": HUGE},
        {"d_sae": "5", "architecture": "topk"},
    ],
)
def test_configurations_of_saes(fields: dict, tmp_path: Path) -> None:
    sae_at(SITES[0]).save_model(tmp_path / "sae")
    changed(tmp_path / "sae" / "cfg.json", **fields)
    for sae_id in (None, SITES[0]):
        with pytest.raises(ValueError, match="sae"):
            load_sae(tmp_path / "sae", sae_id, device="cpu")


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": 5},
        {"alpha_pattern": "x"},
        {"target_modules": ["nothing"]},
        {"target_modules": "(unclosed"},
        {"layers_to_transform": "x"},
        {"layers_to_transform": [99]},
        {"init_lora_weights": "eva", "eva_config": "x"},
        {"r": 2**40},
        {"exclude_modules": 5},
        {"megatron_config": "none", "megatron_core": "antigravity"},
    ],
)
def test_configurations_of_adapters(fields: dict, tiny, tmp_path: Path) -> None:
    tiny.add_adapter("mine", rank=2)
    folder = tiny.save_adapter(tmp_path / "adapter", "mine")
    tiny.remove_adapter("mine")
    changed(folder / "adapter_config.json", **fields)
    before = tiny.fingerprint()
    if {"eva_config", "megatron_core"} & set(fields):  # how an adapter was begun is of no account
        tiny.load_adapter(folder, "other")
        return
    with pytest.raises(ValueError, match=f"{folder}.*"):
        tiny.load_adapter(folder, "other")
    assert tiny.adapters == [] and tiny.fingerprint() == before


def test_chat_templates_that_trip(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    whole = tokenizer.chat_template
    for broken in (
        "{{ 1 / 0 }}",
        "{{ " + "[" * 3000 + " }}",
        "{% for %}",
        "{{ messages[99].content }}",
        "{{ 'x'.encode().x() }}",
    ):
        tokenizer.chat_template = whole + broken
        with pytest.raises(ValueError, match="prompt '1': "):
            encode_prompts(tokenizer, [Prompt(id="1", text="w1")])
    tokenizer.chat_template = "{% for %}"
    with pytest.raises(ValueError, match="the chat template is broken"):
        pin_arguments(tokenizer, {"thinking": True})
