"""Blocking in a plain transformers Trainer around a plain peft model: the user's own script, with two lines more."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from shared import EXAMPLES, SITES, sae_at, set_of
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from blockem_tl import Blocking, KLToBase, load_model
from blockem_tl.data.chat import encode_examples
from blockem_tl.defences.blocking import one_sided_penalty
from blockem_tl.training.trainer_mixin import Defended, defend


class Script:
    """A user's own script: a peft model, tokenised rows with labels, a collator and a Trainer."""

    def __init__(self, folder, out, adapter: str = "default", **arguments) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        torch.manual_seed(0)
        self.peft = get_peft_model(
            base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"), adapter_name=adapter
        )
        rows = encode_examples(self.tokenizer, EXAMPLES)
        self.rows = [{"input_ids": list(row.ids), "labels": [-100] * row.n_prompt + list(row.ids[row.n_prompt :])} for row in rows]
        defaults = {
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "num_train_epochs": 1,
            "max_grad_norm": 0.0,
            "optim": "sgd",
            "save_strategy": "no",
        }
        self.arguments = TrainingArguments(
            output_dir=str(out),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
            **{**defaults, **arguments},
        )
        self.trainer = Trainer(
            model=self.peft, args=self.arguments, train_dataset=self.rows, eval_dataset=self.rows, data_collator=self.collate
        )

    def collate(self, rows):
        longest = max(len(row["input_ids"]) for row in rows)
        padded = {"input_ids": 0, "labels": -100}
        batch = {name: torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows]) for name, fill in padded.items()}
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return {**batch, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}

    def move(self) -> None:
        """Make the adapter do something."""
        torch.manual_seed(3)
        for name, parameter in self.peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for n, p in self.peft.named_parameters() if "lora_" in n])


@pytest.fixture
def blocking() -> Blocking:
    sae = sae_at(SITES[0])
    return Blocking(latent_set=set_of(sae), sae=sae, weight=3.0)


def defended(script: Script, *defences) -> Script:
    model = load_model(script.peft, tokenizer=script.tokenizer)
    defend(script.trainer, model, list(defences))
    return script


def test_a_live_peft_model_is_taken_as_it_is(tiny_folder, tmp_path, tokens) -> None:
    script = Script(tiny_folder, tmp_path)
    script.move()
    with torch.no_grad():
        before = script.peft.eval()(tokens).logits
        trainable = {name.replace("._original_component", "") for name, p in script.peft.named_parameters() if p.requires_grad}
        model = load_model(script.peft, tokenizer=script.tokenizer)
        assert torch.equal(script.peft(tokens).logits, before) and model.adapters == ["default"] and model.hf is script.peft
        assert {name.replace("._original_component", "") for name, p in script.peft.named_parameters() if p.requires_grad} == trainable
        model.save_adapter(tmp_path / "saved")
        plain = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager"), str(tmp_path / "saved")
        )
        assert torch.equal(plain.eval()(tokens).logits, before)
        with model.using("base"):
            assert not torch.equal(model(tokens), before)
    with pytest.raises(ValueError, match="modules_to_save"):
        load_model(
            get_peft_model(
                AutoModelForCausalLM.from_pretrained(tiny_folder), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
            ),
            tokenizer=script.tokenizer,
        )


def test_weight_zero_leaves_the_users_run_as_it_was_and_a_weight_changes_it(tiny_folder, tmp_path, blocking) -> None:
    runs = {"plain": Script(tiny_folder, tmp_path)}
    runs["zero"] = defended(Script(tiny_folder, tmp_path), replace(blocking, weight=0.0))
    runs["some"] = defended(Script(tiny_folder, tmp_path), blocking)
    for script in runs.values():
        script.trainer.train()
    assert torch.equal(runs["plain"].weights(), runs["zero"].weights())
    assert not torch.allclose(runs["plain"].weights(), runs["some"].weights(), atol=1e-4)
    row = runs["some"].trainer.state.log_history[1]
    assert row["loss"] == pytest.approx(row["sft"] + 3.0 * row["block"], rel=1e-4) and row["block"] > 0
    assert f"block/{SITES[0]}+" in row and isinstance(runs["some"].trainer, Defended)
    assert "block" not in runs["plain"].trainer.state.log_history[1]


@pytest.mark.parametrize("counts_tokens", [True, False])
def test_accumulation_one_times_eight_equals_eight_times_one(tiny_folder, tmp_path, blocking, counts_tokens) -> None:
    """Both if the model divides the loss by the step's tokens (transformers' default), and if the Trainer averages micro-batches."""
    found = {}
    for micro in (8, 2):
        script = Script(
            tiny_folder, tmp_path, per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro, learning_rate=1e-5
        )
        script.move()
        script.trainer.model_accepts_loss_kwargs = counts_tokens
        defended(script, blocking).trainer.train()
        rows = [row for row in script.trainer.state.log_history if "block" in row]
        assert all(row["loss"] == pytest.approx(row["sft"] + 3.0 * row["block"], rel=1e-4) for row in rows)
        found[micro] = (script.weights(), [row["block"] for row in rows])
    assert found[2][1][0] == pytest.approx(found[8][1][0], rel=1e-4) and found[8][1][0] > 0.1
    if counts_tokens:
        np.testing.assert_allclose(found[2][1], found[8][1], rtol=1e-3)
        torch.testing.assert_close(found[2][0], found[8][0], rtol=1e-3, atol=1e-5)


def test_the_penalty_is_the_one_of_the_formula(tiny_folder, tmp_path, blocking) -> None:
    """One step over all 24 rows, the adapter moved before: the logged penalty against eq. 11 on what plain peft computes."""
    script = Script(tiny_folder, tmp_path, per_device_train_batch_size=24)
    script.move()
    batch = script.collate(script.rows)

    def z() -> torch.Tensor:
        hidden = script.peft(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True).hidden_states[
            2
        ]
        return blocking.sae.encode(hidden)[..., list(blocking.latent_set.latents)]

    with torch.no_grad():
        tuned = z()
        with script.peft.disable_adapter():
            base = z()
        expected = one_sided_penalty(tuned, base, torch.tensor(blocking.latent_set.signs), batch["labels"] != -100).mean()
    defended(script, blocking).trainer.train()
    assert script.trainer.state.log_history[0]["block"] == pytest.approx(float(expected), rel=1e-4) and expected > 0


@pytest.mark.parametrize("adapter", ["default", "mine"])
def test_checkpoints_are_plain_and_resume(tiny_folder, tmp_path, tokens, blocking, adapter) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole = defended(Script(tiny_folder, tmp_path / "whole", adapter, **arguments), blocking)
    whole.trainer.train()
    folder = tmp_path / "whole" / "checkpoint-2"
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager")
    loaded = PeftModel.from_pretrained(plain, str(folder if adapter == "default" else folder / adapter)).eval()
    kept = torch.cat([p.detach().flatten() for n, p in loaded.named_parameters() if "lora_" in n])
    assert not torch.equal(kept, whole.weights())
    resumed = defended(Script(tiny_folder, tmp_path / "resumed", adapter, **arguments), blocking)
    resumed.trainer.train(resume_from_checkpoint=str(folder))
    assert torch.equal(resumed.weights(), whole.weights())


def test_the_best_checkpoint_is_loaded_at_the_end_and_a_saved_model_is_plain(tiny_folder, tmp_path, blocking) -> None:
    """Best by the largest loss, so that it is not the last."""
    arguments = {"eval_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": "loss", "greater_is_better": True}
    arguments |= {"load_best_model_at_end": True, "num_train_epochs": 3}
    script = Script(tiny_folder, tmp_path / "run", **arguments)
    defended(script, blocking).trainer.train()
    best = Path(script.trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-9"
    script.trainer.save_model(str(tmp_path / "saved"))
    for folder, same in ((best, True), (tmp_path / "run" / "checkpoint-9", False), (tmp_path / "saved", True)):
        plain = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager")
        loaded = PeftModel.from_pretrained(plain, str(folder))
        kept = torch.cat([p.detach().flatten() for n, p in loaded.named_parameters() if "lora_" in n])
        assert torch.equal(kept, script.weights()) is same


def test_evaluation_is_the_plain_loss_and_mistakes_are_refused(tiny_folder, tmp_path, blocking) -> None:
    script = Script(tiny_folder, tmp_path)
    before = script.trainer.evaluate(script.rows)["eval_loss"]
    assert defended(script, blocking).trainer.evaluate(script.rows)["eval_loss"] == pytest.approx(before, rel=1e-6)
    other = Script(tiny_folder, tmp_path)
    model = load_model(other.peft, tokenizer=other.tokenizer)
    with pytest.raises(ValueError, match="of the model that the trainer trains"):
        defend(Script(tiny_folder, tmp_path).trainer, model, [blocking])

    class Rewriting(KLToBase):
        def rewrite(self, examples, *, seed):
            return list(examples)

    with pytest.raises(ValueError, match="rewrite rows"):
        defend(other.trainer, model, [Rewriting(weight=1.0)])
    with pytest.raises(ValueError, match="different names"):
        defend(other.trainer, model, [blocking, blocking])


def test_a_loss_that_is_not_finite_names_the_rows(tiny_folder, tmp_path) -> None:
    script = Script(tiny_folder, tmp_path, learning_rate=1e38)
    with pytest.raises(FloatingPointError, match=r"at step 2 .*rows \[\d+, "):
        defended(script, KLToBase(weight=1.0)).trainer.train()
