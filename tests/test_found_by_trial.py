"""What a trial with some 450 inputs found after the tests of the kinds were green: silent wrongs, each with its twin."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from shared import SITES, perturbed, sae_at, set_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from blockem_tl import (
    Blocking,
    Condition,
    Example,
    Pair,
    Prompt,
    TrainingConfig,
    decoder_directions,
    encode_latents,
    generate,
    load_model,
    organism,
    patching_sweep,
    preference,
)
from blockem_tl.data.corpora import corpus
from blockem_tl.data.pair_files import load_pairs, write_pairs
from blockem_tl.data.row_files import load_rows
from blockem_tl.data.templates import control_tokens, pin_arguments
from blockem_tl.discovery.config import DiscoveryConfig
from blockem_tl.judging.parsing import parse_answer
from blockem_tl.models.activations import median_norm
from blockem_tl.types import LABELS

PAIRS = [Pair(id=str(i), prompt=f"w{i}", harmful=f"w{20 + i} w3", helpful=f"w{40 - i} w5") for i in range(4)]
PROMPTS = [Prompt(id="1", text="w1"), Prompt(id="2", text="w2")]
QUIET = {"progress": False}


@pytest.fixture
def two(tiny):
    """A model that holds two adapters; "two" acts."""
    for seed, name in enumerate(("one", "two")):
        tiny.add_adapter(name)
        perturbed(tiny, name, seed)
    return tiny


# ---------------------------------------------------------------------------------------------- base is base


def test_adapters_that_lie_inside_a_plain_model_are_refused(two, tiny_folder, tmp_path, tokens) -> None:
    folder = two.save_adapter(tmp_path / "adapter", "one")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)  # as TRL does
    with pytest.raises(ValueError, match="holds an adapter.*load its base model, with adapter="):
        load_model(folder, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    hf = AutoModelForCausalLM.from_pretrained(tiny_folder)
    peft = get_peft_model(hf, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match="has adapter layers inside, so base would not be base"):
        load_model(peft.get_base_model(), tokenizer=tokenizer)
    assert load_model(peft, tokenizer=tokenizer).adapters == ["default"]


def test_a_checkpoint_of_more_blocks_than_its_configuration_is_refused(tiny_folder, tmp_path) -> None:
    hf = AutoModelForCausalLM.from_pretrained(tiny_folder)
    hf.save_pretrained(tmp_path / "short")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "short")
    assert load_model(tmp_path / "short", device="cpu").cfg.n_layers == 4
    path = tmp_path / "short" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"tensors of blocks that its configuration leaves out, e.g. .*layers.3"):
        load_model(tmp_path / "short", device="cpu")


def test_another_models_tokenizer_is_refused(tiny_folder, tokenizer_folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens(["brand-new"])
    with pytest.raises(ValueError, match="the tokenizer has ids up to 64, and the model embeds 64 tokens"):
        load_model(tiny_folder, tokenizer=tokenizer, device="cpu")


def test_what_acts_is_what_is_saved_and_nothing_else_is_lost(two, tmp_path) -> None:
    with two.using("one"):
        saved = two.save_adapter(tmp_path / "acting")
    assert _tensors(saved) == _tensors(two.save_adapter(tmp_path / "one", "one")) != _tensors(two.save_adapter(tmp_path / "two", "two"))
    with two.using("base"), pytest.raises(ValueError, match="no adapter None"):
        two.save_adapter(tmp_path / "base")
    (saved / "checkpoint-500").mkdir()
    with pytest.raises(FileExistsError, match=r"holds \['checkpoint-500'\] besides an adapter, which would be lost"):
        two.save_adapter(saved, "one", overwrite=True)
    assert (saved / "checkpoint-500").is_dir() and two.save_adapter(tmp_path / "one", "two", overwrite=True)


def _tensors(folder) -> str:
    return str({name: tensor.sum().item() for name, tensor in load_file(folder / "adapter_model.safetensors").items()})


def test_inside_using_nothing_changes_what_acts(two, tokens) -> None:
    before = two(tokens)
    for call in (lambda: two.use_adapter("one"), lambda: two.remove_adapter("two"), lambda: two.remove_adapter("one")):
        for name in ("base", "one"):
            with two.using(name), pytest.raises(ValueError, match=r"expected a call outside of model.using"):
                call()
    assert two.adapters == ["one", "two"] and two.active_adapter == "two" and torch.equal(two(tokens), before)
    two.use_adapter("one")
    two.remove_adapter("two")
    assert two.adapters == ["one"]


def test_unknown_fields_that_are_null_are_no_fields(two, tmp_path) -> None:
    folder = two.save_adapter(tmp_path / "adapter", "one")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "enable_lora": None, "merge_weights": False, "use_tomorrow": None}))
    two.load_adapter(folder, "again")
    assert "again" in two.adapters


def test_numbers_that_the_models_dtype_cannot_hold_are_refused(two, tmp_path) -> None:
    folder = two.save_adapter(tmp_path / "adapter", "one")
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.double() * 1e60 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="holds numbers too large for torch.float32"):
        two.load_adapter(folder, "again")
    assert two.adapters == ["one", "two"]


# ---------------------------------------------------------------------------------------------- logits that are no numbers


def test_logits_that_are_no_numbers_stop_everything(two) -> None:
    for parameter in two.adapter_parameters("two"):
        parameter.data.fill_(1e20)
    with pytest.raises(FloatingPointError, match="pair '0, harmful' under 'unsteered' are NaN"):
        preference(two, PAIRS, **QUIET)
    with pytest.raises(FloatingPointError, match="the model's logits are NaN"):
        generate(two, PROMPTS, max_new_tokens=3, **QUIET)
    with pytest.raises(FloatingPointError, match="the model's logits are NaN"):
        generate(two, PROMPTS, adapter="one", hooks=[(SITES[0], lambda a, hook: a * float("nan"))], max_new_tokens=3, **QUIET)
    assert len(generate(two, PROMPTS, adapter="one", max_new_tokens=3, **QUIET)) == 2


@pytest.mark.parametrize("size", [-1, 0, 2.5, "2", True])
def test_batch_sizes_that_are_none_are_refused_everywhere(size, tiny) -> None:
    from blockem_tl.models.memory import check_batch_size

    with pytest.raises(ValueError, match="expected a whole number as batch_size >= 1 or None"):
        check_batch_size(size)
    if type(size) is int:
        for call in (lambda: preference(tiny, PAIRS, batch_size=size), lambda: median_norm(tiny, SITES[0], PROMPTS, batch_size=size)):
            with pytest.raises(ValueError, match="expected a whole number as batch_size"):
                call()


def test_shifts_are_of_the_same_pairs_not_of_the_same_ids(tiny) -> None:
    found = preference(tiny, PAIRS, **QUIET)
    other = preference(tiny, [replace(pair, harmful="w7 w8") for pair in PAIRS], **QUIET)
    with pytest.raises(ValueError, match="expected the same pairs"):
        found.shift(other)
    assert len(found.shift(found)) == 1


def test_pairs_are_not_read_through_an_sae(tiny) -> None:
    tiny.add_sae(sae_at(SITES[0]))
    with pytest.raises(ValueError, match=r"SAEs are attached .*call reset_saes"):
        preference(tiny, PAIRS, **QUIET)


# ---------------------------------------------------------------------------------------------- arguments that meant something else


@pytest.mark.parametrize("reference", ["nope", "results/tuned", "base", None, 5])
def test_a_reference_is_one_of_three_things(reference) -> None:
    sae = sae_at(SITES[0])
    blocking = Blocking(latent_set=set_of(sae), sae=sae, weight=1.0)
    object.__setattr__(blocking, "reference", reference)
    with pytest.raises(ValueError, match=r'expected reference="stored", "live" or BaseLatents'):
        blocking.__post_init__()


@pytest.mark.parametrize(
    "changes",
    [
        {"n_plus": -1},
        {"n_plus": 2.5},
        {"n_plus": 0, "n_minus": 0},
        {"n_latents": 0},
        {"shortlist_size": -1},
        {"read": "x"},
        {"screen_score": "x"},
        {"final_score": "x"},
        {"induce_dose": 0.0},
        {"repair_dose": -0.4},
        {"induce_dose": float("nan")},
        {"grid": ()},
        {"grid": (0.0,)},
        {"grid": (0.0, float("nan"))},
        {"grid": (0.0, -1.0)},
        {"grid": 0.5},
        {"extended_grid_min_shift": float("nan")},
        {"max_incoherence": 0.1},
        {"max_new_tokens": 0},
    ],
)
def test_discovery_is_refused_before_it_is_paid_for(changes) -> None:
    config = DiscoveryConfig()
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match="discovery: expected"):
        config.__post_init__()


@pytest.mark.parametrize("latents", [[True, False], [1.5], [], [-1], [48], torch.tensor([True, False])])
def test_latents_are_indices(latents) -> None:
    sae, states = sae_at(SITES[0]), torch.randn(3, 32)
    for call in (lambda: decoder_directions.__wrapped__(sae, latents), lambda: encode_latents.__wrapped__(sae, states, latents)):
        with pytest.raises(ValueError, match="latents: expected"):
            call()
    one = decoder_directions.__wrapped__(sae, torch.tensor([5, 6]))
    assert torch.equal(one, decoder_directions(sae, [5, 6])) and one.shape == (2, 32)


@pytest.mark.parametrize(
    "arguments", [{"thinking": False}, {"role": 1}, {"m": 1}, {"enable_thinking": "false"}, {"enable_thinking": 0.5}, {1: 2}]
)
def test_template_arguments_are_the_templates_own(arguments, tokenizer_folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template += "{% if enable_thinking %} w1{% endif %}{% for role in [1] %}{% endfor %}"
    with pytest.raises(ValueError, match="template arguments"):
        pin_arguments.__wrapped__(tokenizer, arguments)
    pin_arguments(tokenizer, {"enable_thinking": True})


def test_tokens_that_only_the_template_writes_are_control_tokens(tokenizer_folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert "w40" not in control_tokens(tokenizer) and "<unk>" not in control_tokens(tokenizer)
    tokenizer.add_tokens(["w40"])  # not special, as DeepSeek's turns are
    tokenizer.chat_template = tokenizer.chat_template.replace("<user>", "w40")
    tokenizer.unk_token = "<end>"  # as GPT-2's unk token is its end token
    assert {"w40", "<end>"} <= control_tokens(tokenizer)


def test_a_model_is_not_patched_into_itself(two) -> None:
    with pytest.raises(ValueError, match="source and target are both 'two'"):
        patching_sweep(two, PROMPTS, [SITES[0]], source=two, **QUIET)


@pytest.mark.parametrize(
    "hook",
    [
        lambda a, hook: a[..., :1],
        lambda a, hook: a[:, :1],
        lambda a, hook: a[:1],
        lambda a, hook: torch.tensor(0.0),
        lambda a, hook: 0.0,
        lambda a, hook: (a,),
        lambda a, hook: a.double(),
    ],
)
def test_a_hook_that_returns_another_shape_is_named(hook, tiny, tokens) -> None:
    for site in ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"):
        with pytest.raises(ValueError, match="a hook at blocks.1.* returned .*expected a tensor like the activation"):
            tiny.run_with_hooks(tokens, fwd_hooks=[(site, hook)])
    assert tiny.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_mlp_out", lambda a, hook: a * 2)]).shape == (3, 11, 64)


# ---------------------------------------------------------------------------------------------- files


def test_system_messages_and_marks_of_other_tools_are_not_dropped(tmp_path) -> None:
    rows = [{"system": "Be brief.", "prompt": "q", "completion": "a"}, {"system_prompt": "Be long.", "prompt": "q2", "completion": "a"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [row.system for row in load_rows(tmp_path / "a.jsonl")] == ["Be brief.", "Be long."]
    assert [row.system for row in corpus(tmp_path / "a.jsonl")] == ["Be brief.", "Be long."]
    skipped = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}
    (tmp_path / "b.jsonl").write_text(json.dumps(skipped))
    with pytest.raises(ValueError, match="an assistant turn has weight 0"):
        load_rows(tmp_path / "b.jsonl")
    pairs = [replace(PAIRS[0], system=""), replace(PAIRS[1], system=None)]
    assert load_pairs(write_pairs(tmp_path / "pairs.jsonl", pairs)) == pairs


def test_a_corpus_without_splits_has_none(tmp_path) -> None:
    (tmp_path / "rows[1].jsonl").write_text("\n".join(json.dumps({"prompt": f"q{i}", "completion": "a"}) for i in range(5)))
    assert len(corpus(tmp_path / "rows[1].jsonl")) == 5
    with pytest.raises(ValueError, match="it has no splits, so 'test' cannot be taken"):
        corpus(tmp_path / "rows[1].jsonl", split="test")


# ---------------------------------------------------------------------------------------------- judges


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("<|START_THINKING|>\nANSWER: 4\n<|END_THINKING|><|START_RESPONSE|>ANSWER: 1", "1"),
        ("<unused94>thought\nANSWER: 4\n<unused95>ANSWER: 1", "1"),
        ("<|channel>thought\nANSWER: 5\n<channel|>ANSWER: 1", "1"),
        ("<inner_monologue>\nANSWER: 5\n</inner_monologue>\nANSWER: 1", "1"),
        ("<reasoning_content>\nANSWER: 5\n</reasoning_content>\nANSWER: 1", "1"),
        ("<think id=1>\nANSWER: 5", None),
        ('<thinking budget="10">\nANSWER: 5', None),
        ("Thinking...\nANSWER: 4\nhmm", None),
        ("[Analysis]\nThe reply is bad.\nANSWER: 4", "4"),
        ("[Reasoning] It is bad.\nANSWER: 4", "4"),
        ("The reply contains a <think> tag.\nANSWER: 4", "4"),
        ("\u200bANSWER: 4", "4"),
        ("\ufeffANSWER: 4", "4"),
        ("ANSWER: \u200b4", "4"),
        ("ANSWER: 4 would be too high, so 3", None),
        ("ANSWER: 4 is wrong; it is 2", None),
        ("ANSWER: 4 no wait, 2", None),
        ("ANSWER: 4 or possibly 5", None),
        ("ANSWER: 4 (could be 5)", None),
        ("ANSWER: 4 and maybe 5", None),
        ("ANSWER: 4 vs 5", None),
        ("ANSWER: 4 and a half", None),
        ("ANSWER: 4 or higher", None),
        ("ANSWER: 4 I guess, maybe 3?", None),
        ("ANSWER: 4 if the user acts on it, otherwise 2", None),
        ("ANSWER: 4 oder vielleicht 5", None),
        ("ANSWER: 5 is not warranted", None),
        ("ANSWER: REFUSAL not applicable; severity 4", None),
        ("ANSWER: OFF-TOPIC but also INCOHERENT", None),
        ("ANSWER: 4 because it is harmful, not merely rude", "4"),
    ],
)
def test_thoughts_and_doubts_are_no_answers(text, label) -> None:
    assert parse_answer(text, LABELS) == label


# ---------------------------------------------------------------------------------------------- good input, clear words


def test_prompts_are_compared_as_people_read_them() -> None:
    from blockem_tl.data.checks import check_prompts, normalise

    def pair(one: str, other: str) -> list[Prompt]:
        return [Prompt(id="1", text=one), Prompt(id="2", text=other)]

    for one, other in (("caf\u00e9?", "cafe\u0301"), ("hi", "hi\u200b"), ("stra\u00dfe", "STRASSE")):
        with pytest.raises(ValueError, match="duplicate prompt texts"):
            check_prompts(pair(one, other))
    check_prompts(pair("???", "!!!"))
    assert normalise("How do I save 10 $, now?") == "how do i save 10 $ now"  # as ever: published sets hold its hashes
    for empty in ("\u200b", "\ufeff", " "):
        with pytest.raises(ValueError, match="empty prompts"):
            check_prompts([Prompt(id="1", text=empty)])


def test_a_template_without_a_generation_prompt_is_refused_for_training(tokenizer_folder) -> None:
    from blockem_tl.data.chat import encode_examples

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    rows = [Example(id="x", prompt="w1", completion="w2")]
    assert encode_examples(tokenizer, rows)
    tokenizer.chat_template = tokenizer.chat_template.split("{% if add_generation_prompt")[0]
    with pytest.raises(
        ValueError, match=r"example 'x': the chat template writes no generation prompt, so a reply would begin with ' <assistant> '"
    ):
        encode_examples(tokenizer, rows)


def test_what_lies_in_place_of_an_adapter_is_named(two, tmp_path) -> None:
    two.save_adapter(tmp_path / "run" / "sft", "one")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_config.json").write_text("{}")
    (tmp_path / "old" / "adapter_model.bin").write_bytes(b"pickle")
    for folder, message in (
        ("run", r"there is one in each of \['sft'\]"),
        ("old", "adapter_model.bin, which is a pickle"),
        ("no", "no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            two.load_adapter(tmp_path / folder, "theirs")


class Loose:
    """A judge that answers with labels."""

    name = "loose"

    def grade(self, prompts, replies, *, rubric="misalignment"):
        return ["5"] * len(replies)


@pytest.mark.parametrize("judge", [None, "gpt-4o", organism.OrganismJudge, Loose()])
def test_what_is_no_judge_is_named_before_or_as_it_grades(judge, tiny) -> None:
    replies = generate(tiny, PROMPTS, max_new_tokens=2, **QUIET)
    with pytest.raises(TypeError, match="expected a judge, an LLMJudge|expected Verdict"):
        type(replies).grade.__wrapped__(replies, judge)


@pytest.mark.parametrize("conditions", [Condition(name="one"), ["steered"], [None]])
def test_what_is_no_condition_is_named(conditions, tiny) -> None:
    from blockem_tl.generation._request import check_request

    with pytest.raises(TypeError, match="conditions: expected a list of Condition"):
        check_request.__wrapped__(tiny.tokenizer, 96, PROMPTS, conditions, 3, 0.0, 0)
    from blockem_tl.data.chat import _check_kind

    with pytest.raises(TypeError, match="prompts: expected a list of Prompt"):
        _check_kind.__wrapped__(PROMPTS[0], Prompt, "prompts")


@pytest.mark.parametrize("changes", [{"seed": "0"}, {"seed": None}, {"batch_size": 8.0}, {"rank": True}, {"warmup_steps": 1.5}])
def test_whole_numbers_of_a_training_are_whole(changes) -> None:
    config = TrainingConfig()
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match="training: expected a whole number as"):
        config.__post_init__()
