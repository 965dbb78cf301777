"""Rows that a collator joins into one are refused: base and penalties read each row by itself, and would read something else."""

import pytest
import torch
from shared import SITES, sae_at, set_of
from transformers import AutoTokenizer, Trainer, TrainingArguments

from blockem_tl import Blocking, load_model
from blockem_tl.training.trainer_mixin import defend

ROWS = [{"input_ids": [1, 9, 10, 11, 12 + i, 2], "labels": [-100, -100, -100, 11, 12 + i, 2]} for i in range(8)]
IDS, LABELS = torch.tensor([row["input_ids"] for row in ROWS[:2]]), torch.tensor([row["labels"] for row in ROWS[:2]])


def padded(rows):
    ids, labels = (torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels"))
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def joined(rows, **extra):
    one = padded(rows)
    return {"input_ids": one["input_ids"].reshape(1, -1), "labels": one["labels"].reshape(1, -1), **extra}


def trainer_of(tiny_folder, tmp_path, collator, **arguments):
    model = load_model(tiny_folder, device="cpu")
    model.tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model.add_adapter("default")
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=0.0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **arguments,
    )
    trainer = Trainer(model=model.hf, args=args, train_dataset=ROWS, data_collator=collator)
    sae = sae_at(SITES[0])
    return trainer, model, [Blocking(latent_set=set_of(sae), sae=sae, weight=1.0, reference="live")]


PACKED = {
    "positions that start again": lambda rows: joined(rows, position_ids=torch.arange(6).repeat(len(rows))[None]),
    "lengths of sequences": lambda rows: joined(rows, cu_seq_lens_q=torch.tensor([0, 6, 12]), cu_seq_lens_k=torch.tensor([0, 6, 12])),
    "indices of sequences": lambda rows: joined(rows, seq_idx=torch.arange(len(rows)).repeat_interleave(6)[None]),
    "a mask of pairs": lambda rows: {**padded(rows), "attention_mask": torch.ones(len(rows), 1, 6, 6)},
    "other positions": lambda rows: {**padded(rows), "position_ids": torch.arange(5, 11).expand(len(rows), 6)},
}


@pytest.mark.parametrize("name", PACKED)
def test_a_collator_that_packs_is_refused_at_the_first_step(name, tiny_folder, tmp_path) -> None:
    trainer, model, defences = trainer_of(tiny_folder, tmp_path, PACKED[name], remove_unused_columns=False)
    defend(trainer, model, defences)
    with pytest.raises(ValueError, match=r"defend: .*packed and padding-free rows are not supported.*packing=False"):
        trainer.train()


@pytest.mark.parametrize("extra", [{}, {"position_ids": torch.arange(6)[None].expand(2, 6)}])
def test_padded_rows_are_right_and_cost_nothing_at_the_start(extra, tiny_folder, tmp_path) -> None:
    trainer, model, defences = trainer_of(tiny_folder, tmp_path, lambda rows: {**padded(rows), **extra}, logging_steps=1)
    defend(trainer, model, defences)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["block"] == pytest.approx(0.0, abs=1e-6)  # a fresh adapter is base


@pytest.mark.parametrize("name", ["packing", "padding_free"])
def test_a_trainer_that_says_so_is_refused_at_once(name, tiny_folder, tmp_path) -> None:
    trainer, model, defences = trainer_of(tiny_folder, tmp_path, padded)
    setattr(trainer.args, name, True)
    with pytest.raises(ValueError, match=f"the trainer's {name} join several rows into one"):
        defend(trainer, model, defences)
    assert type(trainer) is Trainer
