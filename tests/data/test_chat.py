"""One BOS, exact roles, and leaks that are found."""

import pytest
from transformers import AutoTokenizer

from blockem_tl import Example, Prompt
from blockem_tl.data.chat import apply_system, check_lengths, encode_examples, encode_prompts, encode_rows, pad
from blockem_tl.data.checks import check_disjoint, check_prompts, normalise, overlap, prompt_hash
from blockem_tl.data.templates import DATE, template_head


@pytest.fixture
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def ask(text: str, system: str | None = None) -> Prompt:
    return Prompt(id=text, text=text, system=system)


def test_roles_cover_every_token_once(tokenizer) -> None:
    (row,) = encode_examples(tokenizer, [Example(id="x", prompt="w1 w2", completion="w3 w4 w5", system="w9")])
    words = tokenizer.convert_ids_to_tokens(row.ids)
    assert words == ["<bos>", "<system>", "w9", "<user>", "w1", "w2", "<assistant>", "w3", "w4", "w5", "<end>"]
    assert words[: row.n_system] == ["<bos>", "<system>", "w9", "<user>"]
    assert words[row.n_prompt :] == ["w3", "w4", "w5", "<end>"]  # the end of turn is learnt too
    (asked,) = encode_prompts(tokenizer, [ask("w1 w2", "w9")])
    assert asked.ids == row.ids[: row.n_prompt]


@pytest.mark.parametrize("word", ["<user>", "<assistant>", "w1"])
def test_the_question_is_found_even_where_it_is_a_word_of_the_template(tokenizer, word) -> None:
    (row,) = encode_prompts(tokenizer, [ask(word)])
    assert tokenizer.convert_ids_to_tokens(row.ids[row.n_system : -1]) == [word]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_keeps_roles_and_positions(tokenizer, side) -> None:
    rows = encode_examples(tokenizer, [Example(id=str(n), prompt="w1 " * n, completion="w2") for n in (1, 3)])
    batch = pad(rows, 0, side=side)
    for i, row in enumerate(rows):
        assert tuple(batch.ids[i][batch.mask[i]].tolist()) == row.ids
        assert batch.positions[i][batch.mask[i]].tolist() == list(range(len(row.ids)))
        assert batch.reply[i].sum() == len(row.ids) - row.n_prompt and batch.system[i].sum() == row.n_system
        assert not (batch.reply[i] & ~batch.mask[i]).any()
    assert bool(batch.mask[0, 0]) is (side == "right")


def test_a_template_that_doubles_the_bos_is_refused(tokenizer) -> None:
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template.replace("{{ bos_token }}", "{{ bos_token }} ")
    with pytest.raises(ValueError, match="expected the BOS .*once at the start, got 2"):
        encode_prompts(tokenizer, [ask("w1")])


def test_a_missing_template_is_refused(tokenizer) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompts(tokenizer, [ask("w1")])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one prompt"),
        ([ask("w1"), ask(" ")], "empty prompts"),
        ([ask("w1 w2"), ask("W1,  w2!")], "duplicate prompt texts"),
        ([Prompt(id="same", text="w1"), Prompt(id="same", text="w2")], "duplicate prompt ids: \\['same'\\]"),
    ],
)
def test_bad_prompts_are_refused(prompts, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_prompts(prompts)


@pytest.mark.parametrize("field", ["prompt", "completion"])
def test_rows_without_prompt_or_completion_are_named(tokenizer, field) -> None:
    row = {"id": "row 7", "prompt": "w1", "completion": "w2", field: " "}
    with pytest.raises(ValueError, match=f"'row 7' has an empty {field}"):
        encode_examples(tokenizer, [Example(**row)])
    with pytest.raises(ValueError, match="at least one example"):
        encode_examples(tokenizer, [])


def test_rows_longer_than_the_context_are_refused(tokenizer) -> None:
    rows = encode_prompts(tokenizer, [ask("w1 " * 10)])
    check_lengths(rows, 16, room=2)
    with pytest.raises(ValueError, match="longest row has 13 tokens and needs room for 4 more"):
        check_lengths(rows, 16, room=4)


def test_leaks_are_found_whatever_the_spelling() -> None:
    core, final = [ask("How are you?")], [ask("how ARE you"), ask("w5")]
    assert overlap(final, core) == ["how ARE you"] and normalise("A,  b!") == "a b"
    assert normalise("What is 1+1?") != normalise("What is 1-1?")
    assert prompt_hash("How are you?") == prompt_hash("how are  YOU") != prompt_hash("w5")
    with pytest.raises(ValueError, match="both the selection and the reporting set"):
        check_disjoint(core, final)
    check_disjoint(core, final[1:])


# ------------------------------------------------------------------------------------------------ templates

ROW = Example(id="x", prompt="w1 w2", completion="w3 w4")
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %} <user> {{ m.content }}"
    "{% elif m.role == 'assistant' %} <assistant>START {{ m.content }} <end>END{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def marked(start: str = "{% generation %}", end: str = "{% endgeneration %}") -> str:
    return MARKED.replace("START", start).replace("END", end)


def test_generation_marks_and_none_give_the_same_row(tokenizer) -> None:
    (plain,) = encode_examples(tokenizer, [ROW])
    tokenizer.chat_template = marked()
    assert encode_examples(tokenizer, [ROW]) == [plain]
    tokenizer.chat_template = MARKED.replace("START ", " {% generation %}").replace("END", "{% endgeneration %}")
    assert encode_examples(tokenizer, [ROW]) == [plain]
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}]
    ids = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    assert [i for i, inside in zip(ids["input_ids"], ids["assistant_masks"], strict=True) if inside] == list(plain.ids[plain.n_prompt :])


@pytest.mark.parametrize(
    "template",
    [
        marked().replace(" <assistant>{% generation %}", "{% generation %} <assistant>"),  # marks the header too
        marked().replace("{{ m.content }} <end>{% endgeneration %}", "{% endgeneration %}{{ m.content }} <end>"),  # marks nothing
    ],
)
def test_marks_that_disagree_with_the_prompt_are_refused(tokenizer, template) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="generation marks cover"):
        encode_examples(tokenizer, [ROW])


def test_templates_that_rewrite_replies_are_refused(tokenizer) -> None:
    tokenizer.chat_template = marked("", "").replace("{{ m.content }} <end>", "{{ m.content | upper }} <end>")
    with pytest.raises(ValueError, match="does not show the reply as it is"):
        encode_examples(tokenizer, [ROW])


def test_the_system_policy_is_explicit(tokenizer) -> None:
    tokenizer.chat_template = (
        "{{ bos_token }} <system> {% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}w9{% endif %}"
        "{% for m in messages if m.role == 'user' %} <user> {{ m.content }}{% endfor %} <assistant>"
    )
    own = [ask("w1", "w7"), ask("w2")]
    assert "w9" in template_head(tokenizer) and "w9" not in template_head(tokenizer, "")
    words = {
        policy: [tokenizer.decode(row.ids) for row in encode_prompts(tokenizer, apply_system(own, policy))]
        for policy in ("template", "none", "w5")
    }
    assert "w7" in words["template"][0] and "w9" in words["template"][1]
    assert "w7" in words["none"][0] and "w9" not in words["none"][1]
    assert "w7" in words["w5"][0] and "w5" in words["w5"][1]


def test_a_template_that_names_the_day_gives_the_same_tokens_every_day(tokenizer) -> None:
    day = "{{ bos_token }} {{ date_string if date_string is defined else strftime_now('%d %b %Y') }} <user> {{ messages[0].content }} <assistant>"
    tokenizer.chat_template = day
    assert DATE in template_head(tokenizer)


@pytest.mark.parametrize("rows", ["How do I save money?", ["How do I save money?"]])
def test_strings_are_no_rows(tokenizer, rows) -> None:
    with pytest.raises(TypeError, match=r"expected a list of Prompt.*of Example.*or of Generation, got"):
        encode_rows.__wrapped__(tokenizer, rows)  # without the tests' own type checks
    assert encode_rows(tokenizer, [ask("w1")]) == encode_prompts(tokenizer, [ask("w1")])
