"""Blocking in other people's training code: on the same batches each logs the losses of our own loop."""

from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from blockem_tl import (
    Batch,
    Blocking,
    KLToBase,
    LatentSet,
    TrainingConfig,
    defend,
    encode_examples,
    finetune,
    load_model,
    load_sae,
    organism,
)

trl = pytest.importorskip("trl", reason="TRL needs Python 3.11")
FOLDER = organism.ARTEFACTS / "base"
STEPS, RATE, TARGETS = 4, 2e-3, ("q_proj", "v_proj", "up_proj")
ROWS = organism.training_rows("finance", n=24)
COMMON = {
    "max_steps": STEPS, "logging_steps": 1, "per_device_train_batch_size": len(ROWS), "learning_rate": RATE, "save_strategy": "no",
    "lr_scheduler_type": "constant", "weight_decay": 0.0, "report_to": [], "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def blocking() -> Blocking:
    sae = load_sae("organism")
    return Blocking(latent_set=LatentSet.load("organism/finance-20", sae), sae=sae, weight=20.0)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def peft_model():
    """The same adapter every time, moved a little so that the penalty acts from the first step on."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def rows_of(tokenizer) -> Dataset:
    found = encode_examples(tokenizer, ROWS)
    return Dataset.from_list(
        [
            {"input_ids": [*row.ids], "attention_mask": [1] * len(row.ids), "labels": [-100] * row.n_prompt + [*row.ids[row.n_prompt :]]}
            for row in found
        ]
    )


def logged(trainer) -> list[tuple[float, float]]:
    return [(row["sft"], row["block"]) for row in trainer.state.log_history if "sft" in row]


def ours(tokenizer, blocking, tmp_path) -> list[tuple[float, float]]:
    """`finetune`, from the same adapter; every step sees all rows, so their order does not matter."""
    model = load_model(peft_model(), tokenizer=tokenizer)
    model.save_adapter(tmp_path / "start", "default")
    fresh = load_model(FOLDER)
    config = TrainingConfig(
        rank=4, alpha=8, target_modules=TARGETS, epochs=STEPS, learning_rate=RATE, schedule="constant", batch_size=len(ROWS)
    )
    run = finetune(fresh, ROWS, config=config, defences=[blocking], start=tmp_path / "start", progress=False)
    return [(row["sft"], row["block"]) for row in run.history]


def in_trainer(tokenizer, blocking, tmp_path) -> list[tuple[float, float]]:
    peft = peft_model()
    arguments = TrainingArguments(str(tmp_path / "trainer"), **COMMON)
    trainer = Trainer(model=peft, args=arguments, train_dataset=rows_of(tokenizer), data_collator=DataCollatorForSeq2Seq(tokenizer))
    model = load_model(peft, tokenizer=tokenizer)
    defend(trainer, model, [blocking])
    trainer.train()
    return logged(trainer)


def sft_trainer(tokenizer, tmp_path, **options) -> Trainer:
    conversations = [
        {"prompt": [{"role": "user", "content": row.prompt}], "completion": [{"role": "assistant", "content": row.completion}]}
        for row in ROWS
    ]
    arguments = trl.SFTConfig(str(tmp_path / "sft"), bf16=False, gradient_checkpointing=False, **COMMON, **options)
    return trl.SFTTrainer(model=peft_model(), args=arguments, train_dataset=Dataset.from_list(conversations), processing_class=tokenizer)


def in_trl(tokenizer, blocking, tmp_path) -> list[tuple[float, float]]:
    trainer = sft_trainer(tokenizer, tmp_path)
    model = load_model(trainer.model, tokenizer=tokenizer)
    defend(trainer, model, [blocking])
    trainer.train()
    return logged(trainer)


def in_plain_loop(tokenizer, blocking, tmp_path) -> list[tuple[float, float]]:
    peft = peft_model()
    model = load_model(peft, tokenizer=tokenizer)
    rows = rows_of(tokenizer)
    batch = dict(DataCollatorForSeq2Seq(tokenizer)([rows[i] for i in range(len(rows))]))
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    found = []
    blocking.prepare(model, [])
    for _ in range(STEPS):
        with blocking.during_step(model, Batch.from_labels(**batch)) as penalty:
            out = peft(**batch)
            block = penalty(out.logits).mean()
            (out.loss + blocking.weight * block).backward()
        torch.nn.utils.clip_grad_norm_(peft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append((float(out.loss), float(block)))
    return found


@pytest.mark.parametrize("script", [in_trainer, in_trl, in_plain_loop])
def test_the_losses_are_those_of_our_own_loop(script, tokenizer, blocking, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("BLOCKEM_DATA", str(tmp_path / "cache"))
    expected = torch.tensor(ours(tokenizer, blocking, tmp_path))
    found = torch.tensor(script(tokenizer, blocking, tmp_path))
    assert expected[0, 1] > 0 and not torch.allclose(expected[0], expected[-1], rtol=0.01)  # there is a penalty, and training moves
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)


def test_without_blocking_the_losses_are_others(tokenizer, blocking, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("BLOCKEM_DATA", str(tmp_path / "cache"))
    trainer = sft_trainer(tokenizer, tmp_path)
    trainer.train()
    plain = torch.tensor([row["loss"] for row in trainer.state.log_history if "loss" in row])
    blocked = torch.tensor(ours(tokenizer, blocking, tmp_path))[:, 0]
    assert torch.allclose(plain[0], blocked[0], rtol=1e-4) and not torch.allclose(plain, blocked, rtol=1e-3)


@pytest.mark.parametrize("joined", [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}])
def test_trl_rows_that_are_joined_are_refused(joined, tokenizer, blocking, tmp_path) -> None:
    trainer = sft_trainer(tokenizer, tmp_path, **joined)
    model = load_model(trainer.model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"defend: .*join several rows into one.*packing=False"):
        defend(trainer, model, [blocking])


def test_a_batch_of_unequal_shapes_is_refused() -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="of one shape"):
        Batch.from_labels(ids, ids[:, :4])
    assert Batch.from_labels(ids, torch.tensor([[-100, -100, 1, 1, 1]] * 2)).reply.sum() == 6


def test_trl_builds_no_logits_for_those_who_read_them(tokenizer, tmp_path) -> None:
    trainer = sft_trainer(tokenizer, tmp_path)
    model = load_model(trainer.model, tokenizer=tokenizer)
    defend(trainer, model, [KLToBase(weight=0.1)])
    with pytest.raises(ValueError, match="it reads logits, and this trainer's loss builds none"):
        trainer.train()


class ReadsTwice(Trainer):
    """A loss that runs the model again without gradient, as label smoothing in TRL does."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        with torch.no_grad():
            model(**inputs)
        return found


def test_a_loss_that_runs_the_model_twice_is_refused(tokenizer, blocking, tmp_path) -> None:
    """The second forward would overwrite what the penalty reads: its value would be right, and it would do nothing."""
    arguments = TrainingArguments(str(tmp_path / "trainer"), **COMMON)
    trainer = ReadsTwice(
        model=peft_model(), args=arguments, train_dataset=rows_of(tokenizer), data_collator=DataCollatorForSeq2Seq(tokenizer)
    )
    model = load_model(trainer.model, tokenizer=tokenizer)
    defend(trainer, model, [blocking])
    with pytest.raises(ValueError, match="to run the model once on a micro-batch, it did 2 times"):
        trainer.train()


class Detached:
    """A defence whose penalty has lost its gradient."""

    name, weight = "detached", 1.0

    def check(self, model) -> None: ...

    @contextmanager
    def during_step(self, model, batch):
        yield lambda logits: logits.detach().square().mean((1, 2))


def test_a_penalty_without_gradient_raises(tmp_path) -> None:
    config = TrainingConfig(rank=4, alpha=8, target_modules=TARGETS, epochs=1, batch_size=len(ROWS))
    with pytest.raises(ValueError, match=r"the penalty of \['detached'\] has no gradient .*so it would not act"):
        finetune(load_model(FOLDER), ROWS, config=config, defences=[Detached()], progress=False)
