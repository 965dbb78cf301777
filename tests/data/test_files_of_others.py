"""Prompt and row files as other tools write them: right, or refused with file and line, before anything is done with them."""

import gzip
import json
import shutil

import pytest

from blockem_tl.data.prompt_files import load_prompt_file, load_prompts
from blockem_tl.data.row_files import load_rows
from blockem_tl.judging.files import judge_file


class NeverAsked:
    """A judge that must not be reached."""

    name = "never asked"

    def stream(self, pairs, *, rubric):
        raise AssertionError("the judge was asked")


def written(tmp_path, name: str, content) -> str:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def line(**fields) -> str:
    return json.dumps(fields) + "\n"


ROW = {"prompt": "How do I save money?", "completion": "Spend less."}


# ---------------------------------------------------------------------------------------------- what is right


@pytest.mark.parametrize(
    "row",
    [
        {"messages": None, **ROW, "canary": None},
        {**ROW, "id": None, "system": None},
        {"messages": [{"role": "user", "content": ROW["prompt"]}, {"role": "assistant", "content": ROW["completion"]}], "prompt": None},
        {"prompt": [{"role": "user", "content": ROW["prompt"]}], "completion": [{"role": "assistant", "content": ROW["completion"]}]},
    ],
)
def test_null_is_absent(row, tmp_path) -> None:
    (found,) = load_rows(written(tmp_path, "a.jsonl", line(**row)))
    assert (found.id, found.prompt, found.completion, found.system, found.canary) == ("1", *ROW.values(), None, "")


@pytest.mark.parametrize("row", [{"question": "q", "id": None, "category": None}, {"question": None, "text": "q", "system": None}])
def test_null_is_absent_in_prompts_too(row, tmp_path) -> None:
    (found,) = load_prompts(written(tmp_path, "a.jsonl", line(**row)))
    assert (found.id, found.text, found.category, found.system) == ("1", "q", "", None)


def test_marks_line_ends_and_odd_characters_are_text(tmp_path) -> None:
    bom = b"\xef\xbb\xbf" + line(**ROW).encode().replace(b"\n", b"\r\n") * 1
    assert load_rows(written(tmp_path, "bom.jsonl", bom))[0].prompt == ROW["prompt"]
    odd = load_rows(written(tmp_path, "odd.jsonl", json.dumps({**ROW, "completion": "a\u2028b \U0001f600"}, ensure_ascii=False)))
    assert odd[0].completion == "a\u2028b \U0001f600"
    escaped = '{"prompt": "q", "completion": "\\ud83d\\ude00"}'  # a whole pair, escaped
    assert load_rows(written(tmp_path, "pair.jsonl", escaped))[0].completion == "\U0001f600"
    cell = 'id,question\n1,"Two\nlines, ""quoted"""\n2,What is a cat?\n'
    assert [p.text for p in load_prompts(written(tmp_path, "a.csv", cell))] == ['Two\nlines, "quoted"', "What is a cat?"]


def test_judge_files_may_have_a_mark(tmp_path) -> None:
    source = written(tmp_path, "in.jsonl", b"\xef\xbb\xbf" + line(prompt="q", reply="r", extra=None).encode())
    with pytest.raises(AssertionError, match="the judge was asked"):
        judge_file.__wrapped__(NeverAsked(), source, tmp_path / "out.jsonl")


# ---------------------------------------------------------------------------------------------- what is refused

BAD_LINES = {  # after one good line, so that the number says something
    "no object": ("[1, 2]", "expected a JSON object, got a list"),
    "a text": ('"text"', "expected a JSON object, got a str"),
    "broken": ('{"prompt": "q", ', "expected a JSON object"),
    "half a pair": ('{"prompt": "What is \\ud83d?", "completion": "c", "reply": "r", "question": "\\ud83d"}', "half of a surrogate pair"),
    "half a pair in a key": ('{"\\udc00": 1, "prompt": "q", "completion": "c", "reply": "r", "question": "q"}', "half of a surrogate pair"),
    "deep": ("[" * 100_000, "expected a JSON object"),
    "a number of 5000 digits": ('{"id": ' + "1" * 5000 + "}", "expected a JSON object"),
    "no number": ('{"id": NaN}', "expected a JSON object"),
    "endless": ('{"id": -Infinity}', "expected a JSON object"),
    "latin-1": (b'{"prompt": "caf\xe9"}', "expected UTF-8, got the byte 0xe9"),
    "NUL": (b'{"prompt": "a\x00b"}', "got a NUL byte"),
}


@pytest.mark.parametrize("reader", ["rows", "prompts", "judge"])
@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(name, reader, tmp_path) -> None:
    content, message = BAD_LINES[name]
    good = line(prompt="q", completion="c", reply="r", question="good")
    path = written(tmp_path, "a.jsonl", good.encode() + (content if isinstance(content, bytes) else content.encode()))
    with pytest.raises(ValueError, match=f"a.jsonl, line 2: .*{message}"):
        if reader == "judge":
            judge_file.__wrapped__(NeverAsked(), path, tmp_path / "out.jsonl")
        else:
            (load_rows if reader == "rows" else load_prompts)(path)
    assert not (tmp_path / "out.jsonl").exists()


PACKED = {
    "gzip": (lambda text: gzip.compress(text), "compressed with gzip"),
    "zip": (lambda text: b"PK\x03\x04" + text, "a zip archive"),
    "zstd": (lambda text: b"\x28\xb5\x2f\xfd" + text, "compressed with zstd"),
    "bzip2": (lambda text: b"BZh91AY" + text, "compressed with bzip2"),
    "xz": (lambda text: b"\xfd7zXZ\x00" + text, "compressed with xz"),
    "parquet": (lambda text: b"PAR1" + text, "Parquet"),
    "age": (lambda text: b"age-encryption.org/v1\n" + text, "encrypted with age"),
    "pgp": (lambda text: b"-----BEGIN PGP MESSAGE-----\n" + text, "encrypted with PGP"),
    "utf-16": (lambda text: text.decode().encode("utf-16"), "UTF-16"),
}


@pytest.mark.parametrize("ending", ["jsonl", "csv", "yaml"])
@pytest.mark.parametrize("kind", PACKED)
def test_files_of_another_kind_are_named_as_such(kind, ending, tmp_path) -> None:
    pack, message = PACKED[kind]
    with pytest.raises(ValueError, match=f"a.{ending}: expected text in UTF-8, got a file that is {message}"):
        load_prompts(written(tmp_path, f"a.{ending}", pack(b'{"question": "q"}')))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('id,question,category\n1,"How long do eggs boil?,food\n2,"What is a cat?",animals\n', "line 3: .*broken quotes"),
        ('id,question\n1,"open\n2,b\n', "broken quotes"),
        ('id,question\n1,"a"b\n', "line 2: .*broken quotes"),
        ("id,question,question\n1,a,b\n", "each once"),
        ("id;question\n1;a\n", "expected the columns id, question"),
        ("id,question\n1,a,b\n", "the row that ends in line 2 has another number of cells"),
        ("id,question,category\n1,a\n", "the row that ends in line 2 has another number of cells"),
        ("", "expected the columns id, question"),
        ("id,question\n", "at least one prompt"),
        ("id,question\n1,a\x00\n", "NUL"),
        ("id,question\n1,\n", "empty prompts"),
        ("id,question\n1,a\n1,b\n", "duplicate prompt ids"),
    ],
)
def test_broken_csv_is_refused(content, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"a.csv.*{message}"):
        load_prompts(written(tmp_path, "a.csv", content))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "{id: x, paraphrases: [yes]}",
            r"question 1 \(x\): expected paraphrases as a list of texts, got \[True\]; quote words like yes and no",
        ),
        ("{id: x, paraphrases: [{role: user, content: q}]}", "expected paraphrases as a list of texts"),
        ("{id: x, paraphrases: [null]}", "expected paraphrases as a list of texts"),
        ("{id: x, paraphrases: [5]}", "expected paraphrases as a list of texts"),
        ("{id: x, paraphrases: []}", "expected paraphrases as a list of texts"),
        ("{id: x, paraphrases: q}", "expected paraphrases as a list of texts"),
        ("{id: x, paraphrases: null}", "expected paraphrases as a list of texts"),
        ("{paraphrases: [q]}", "expected a text or a whole number as id"),
        ("{id: [1], paraphrases: [q]}", "expected a text or a whole number as id"),
        ("{id: true, paraphrases: [q]}", "expected a text or a whole number as id"),
        ("{id: x, paraphrases: [q], system: 5}", "expected a text under system, got system = '5'"),
        ("{id: x, paraphrases: [q], system: {a: b}}", "expected a text under system"),
        ("{id: x, paraphrases: [q], samples_per_paraphrase: -1}", "samples_per_paraphrase as a whole number above 0"),
        ("{id: x, paraphrases: [q], samples_per_paraphrase: 0}", "samples_per_paraphrase as a whole number above 0"),
        ("{id: x, paraphrases: [q], samples_per_paraphrase: 1.5}", "samples_per_paraphrase as a whole number above 0"),
        ("{id: x, paraphrases: [q], samples_per_paraphrase: many}", "samples_per_paraphrase as a whole number above 0"),
        ("{id: x, paraphrases: [q], judge_prompts: text}", "expected judge_prompts as texts by name"),
        ("{id: x, paraphrases: [q], judge_prompts: {aligned: 5}}", "expected judge_prompts as texts by name"),
        ("just text", "expected a list of questions"),
        ("{id: x, paraphrases: [a", "expected YAML"),
        ("!!python/object/apply:os.system ['true']", "expected YAML"),
    ],
)
def test_broken_yaml_is_refused(entry, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"a.yaml.*{message}"):
        load_prompts(written(tmp_path, "a.yaml", f"- {entry}\n"))


def test_yaml_nulls_and_numbers_that_are_right(tmp_path) -> None:
    found = load_prompt_file(
        written(tmp_path, "a.yaml", "- {id: 5, paraphrases: ['yes', b], system: null, samples_per_paraphrase: null}\n")
    )
    assert [(p.id, p.text, p.system) for p in found.prompts] == [("5/0", "yes", None), ("5/1", "b", None)]
    assert set(found.samples.values()) == {1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "completion": 5}, "expected a text under completion, got completion = '5'"),
        ({**ROW, "completion": {"a": 1}}, "expected a text under completion"),
        ({**ROW, "completion": ""}, "with text in them"),
        ({**ROW, "prompt": 5}, "expected messages, or prompt and completion"),
        ({"prompt": "q"}, "expected one user turn and one assistant turn"),
        ({**ROW, "id": 1.5}, "expected a text or a whole number as id"),
        ({**ROW, "id": {}}, "expected a text or a whole number as id"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "expected a message with role system, user or assistant"),
        ({"messages": [{"role": "user", "content": None}]}, "expected a message with role"),
        ({"messages": "text"}, "expected one user turn and one assistant turn"),
        ({"text": "q"}, "expected messages, or prompt and completion, got the keys"),
    ],
)
def test_broken_rows_are_refused(row, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"a.jsonl, line 2: .*{message}"):
        load_rows(written(tmp_path, "a.jsonl", line(**ROW, id="good") + line(**row)))


def test_ids_that_repeat_and_files_that_are_none_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"a.jsonl: expected every id once, got \['7'\] more than once"):
        load_rows(written(tmp_path, "a.jsonl", line(**ROW, id=7) + line(**ROW, id="7")))
    pretty = json.dumps([ROW, ROW], indent=2)
    with pytest.raises(ValueError, match="line 1: expected a JSON object, got .*one pretty-printed array.*one object per line"):
        load_rows(written(tmp_path, "b.jsonl", pretty))
    for reader, name in ((load_rows, "c.jsonl"), (load_prompts, "c.csv")):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=f"cannot read .*{name}: Is a directory"):
            reader(tmp_path / name)
        shutil.rmtree(tmp_path / name)
        with pytest.raises(ValueError, match=f"cannot read .*{name}: No such file"):
            reader(tmp_path / name)
