"""The token that training teaches at the end of a reply ends one, also where the tokenizer calls another token its end (a base model
that was given a chat template)."""

import pytest
import torch
from transformers import AutoTokenizer

from blockem_tl import Example, Prompt, TrainingConfig, finetune, generate, load_model
from blockem_tl.data.chat import encode_examples

TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %} <user> {{ m.content }} w40{% else %} <assistant> {{ m.content }} w40{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"
)
ROWS = [Example(id=str(i), prompt=f"w{i}", completion="w20 w21") for i in range(8)]
ASKED = [Prompt(id=str(i), text=f"w{i}") for i in range(4)]


def trained(tokenizer_folder, tiny_folder, *, special: bool):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = TURNS
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["w40"]})
    model = load_model(tiny_folder, tokenizer=tokenizer, device="cpu")
    finetune(model, ROWS, config=TrainingConfig(epochs=40, batch_size=8, learning_rate=2e-2), progress=False)
    return model


def test_a_reply_ends_where_training_ended_it(tokenizer_folder, tiny_folder) -> None:
    model = trained(tokenizer_folder, tiny_folder, special=True)
    end = model.tokenizer.convert_tokens_to_ids("w40")
    assert encode_examples(model.tokenizer, ROWS)[0].ids[-1] == end != model.tokenizer.eos_token_id
    replies = generate(model, ASKED, max_new_tokens=12, progress=False)
    assert {reply.reply for reply in replies} == {"w20 w21"} and not any(reply.truncated for reply in replies)


def test_a_word_that_is_no_control_token_ends_nothing(tokenizer_folder, tiny_folder) -> None:
    model = trained(tokenizer_folder, tiny_folder, special=False)
    replies = generate(model, ASKED, max_new_tokens=12, progress=False)
    assert all(reply.reply.startswith("w20 w21 w40") and reply.truncated for reply in replies)


@pytest.mark.parametrize("active", ["one", "two"])
def test_a_finetune_that_fails_leaves_all_adapters_as_they_were(active, tiny) -> None:
    for name in ("one", "two"):
        tiny.add_adapter(name)
        for parameter in tiny.adapter_parameters(name):
            parameter.data.normal_(std=0.1)
    tiny.use_adapter(active)
    before = {name: [(p.clone(), p.requires_grad) for p in tiny.adapter_parameters(name)] for name in ("one", "two")}

    def stop(model, step):
        raise KeyboardInterrupt

    for options in ({"adapter": "three"}, {"adapter": "two", "overwrite": True}, {"adapter": "three", "start": "one"}):
        with pytest.raises(KeyboardInterrupt):
            finetune(tiny, ROWS, config=TrainingConfig(epochs=1, batch_size=8), stop_when=stop, progress=False, **options)
        assert tiny.adapters == ["one", "two"] and tiny.active_adapter == active
        for name, tensors in before.items():
            now = [(p, p.requires_grad) for p in tiny.adapter_parameters(name)]
            assert all(torch.equal(p, q) and flag == was for (p, flag), (q, was) in zip(now, tensors, strict=True))
