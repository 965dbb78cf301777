"""Targets of the fuzzing that are weights or belong to them: checkpoints, stores, SAEs, adapters, chat templates."""

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from fuzz_target import Refused, Target
from peft import LoraConfig, get_peft_model
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from safetensors.torch import save
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from blockem_tl import Prompt, load_model, load_sae
from blockem_tl.data.chat import encode_prompts
from blockem_tl.data.templates import pin_arguments
from blockem_tl.models._adapter_config import read_config
from blockem_tl.models._adapter_files import read_tensors
from blockem_tl.saes.load import check_fits
from blockem_tl.storage.store import Store
from blockem_tl.training.checkpoints import Checkpoints, restore_generators, restore_optimizer, trajectory

SITE = "blocks.1.hook_resid_post"


def weight_targets(folder: Path) -> list[Target]:
    """All of them; what they read besides their file lies in ``folder``."""
    model = tiny_model(folder / "model")
    return [*_runs(folder), *_sae_files(folder, model), *_adapter_files(folder, model), *_template_files(model)]


# ------------------------------------------------------------------------------------------------ runs


def _runs(folder: Path) -> Iterator[Target]:
    run = {
        "format": 1,
        "step": 2,
        "finished": False,
        "identity": {"rows": "a", "config.rank": "2"},
        "history": [{"step": 1.0, "epoch": 0.5, "loss": 2.0}],
        "defences": {},
        "environment": {"python": "3"},
    }
    yield Target(name="run.json of a checkpoint", seeds=[json.dumps(run).encode()], parse=_resumed, share=0.08, file="epoch-0.5/run.json")
    state = save(
        {
            "optimizer.0.exp_avg": torch.zeros(2, 3),
            "optimizer.0.exp_avg_sq": torch.zeros(2, 3),
            "optimizer.0.step": torch.ones(()),
            "generator.0.cpu": torch.get_rng_state(),
        }
    )
    yield Target(
        name="training_state.safetensors", seeds=[state], parse=_restored, share=0.01, file="training_state.safetensors", structured=False
    )
    store = Store(folder / "seed.sqlite")
    store.put({str(i): {"label": "1", "said": ["x"], "scores": {}} for i in range(3)})
    store.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    yield Target(name="store", seeds=[(folder / "seed.sqlite").read_bytes()], parse=_stored, share=0.005, file="s.sqlite", structured=False)


def _resumed(path: Path) -> None:
    kept = Checkpoints(path.parents[1], 0.5)
    with suppress(Refused):
        try:
            kept.to_resume({"rows": "a", "config.rank": "2"}, resume=True)
        except ValueError as error:
            raise (Refused if "of another run" in str(error) else error) from error
    trajectory(path.parents[1])


def _restored(path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.AdamW([parameter])
    restore_optimizer(optimizer, path.parent)
    restore_generators(path.parent)
    parameter.sum().backward()
    optimizer.step()


def _stored(path: Path) -> None:
    for beside in ("s.sqlite-wal", "s.sqlite-shm"):
        path.with_name(beside).unlink(missing_ok=True)
    store = Store(path)
    try:
        dict(store)
        store.get(["0", "1"])
    finally:
        store.close()


# ------------------------------------------------------------------------------------------------ SAEs, adapters, templates


def small_sae(kind: str = "standard", d_sae: int = 8) -> SAE[Any]:
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=d_sae)) if kind == "standard" else TopKSAE(TopKSAEConfig(d_in=32, d_sae=d_sae, k=2))
    sae.cfg.metadata.hook_name = SITE
    return sae


def _sae_files(folder: Path, model: Any) -> Iterator[Target]:
    for kind in ("standard", "topk"):
        small_sae(kind).save_model(folder / kind)
    configs = [json.dumps(json.loads((folder / kind / "cfg.json").read_bytes())).encode() for kind in ("standard", "topk")]
    weights = [(folder / "standard" / "sae_weights.safetensors").read_bytes()]
    parse = _Loaded(folder / "standard", model)
    yield Target(name="SAE's cfg.json", seeds=configs, parse=parse, share=0.015, file="cfg.json")
    yield Target(name="SAE's weights", seeds=weights, parse=parse, share=0.01, file="sae_weights.safetensors", structured=False)


def _adapter_files(folder: Path, model: Any) -> Iterator[Target]:
    whole = folder / "adapter"
    hf: Any = LlamaForCausalLM.from_pretrained(folder / "model")
    get_peft_model(hf, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")).save_pretrained(str(whole))
    config_name, tensors_name = "adapter_config.json", "adapter_model.safetensors"
    plain = json.loads((whole / config_name).read_bytes())
    odd = {**plain, "rank_pattern": {"q_proj": 3}, "layers_to_transform": [0, 1], "exclude_modules": ["k"]}
    configs, tensors = [json.dumps(one).encode() for one in (odd, plain)], [(whole / tensors_name).read_bytes()]
    read = {config_name: lambda path: read_config(path.parent), tensors_name: lambda path: read_tensors(path.parent)}
    yield Target(name=config_name, seeds=configs, parse=read[config_name], share=0.04, file=config_name)
    yield Target(name=tensors_name, seeds=tensors, parse=read[tensors_name], share=0.03, file=tensors_name, structured=False)
    loaded = _Adapter(whole, model)
    yield Target(name="adapter folder, configuration", seeds=configs[1:], parse=loaded, share=0.002, file=config_name)
    yield Target(name="adapter folder, tensors", seeds=tensors, parse=loaded, share=0.001, file=tensors_name, structured=False)


def _template_files(model: Any) -> Iterator[Target]:
    seeds, file = [TEMPLATE.encode()], "chat_template.jinja"
    parse = _Rendered(model.tokenizer)
    yield Target(name="chat template", seeds=seeds, parse=parse, share=0.008, file=file, structured=False, named=False)


class _Loaded:
    """An SAE's folder with one file replaced."""

    def __init__(self, whole: Path, model: Any) -> None:
        self.whole, self.model = whole, model

    def __call__(self, path: Path) -> None:
        for file in self.whole.iterdir():
            if file.name != path.name and not (path.parent / file.name).exists():
                shutil.copyfile(file, path.parent / file.name)
        sae = load_sae(path.parent, device="cpu")
        with suppress(Refused):
            try:
                check_fits(sae, self.model)
            except (ValueError, TypeError) as error:  # it names the site, or the SAE
                raise Refused from error
            assert sae.encode(torch.ones(1, sae.cfg.d_in)).shape == (1, sae.cfg.d_sae)


class _Adapter:
    """An adapter's folder with one file replaced; refused or taken out again, the model is as it was."""

    def __init__(self, whole: Path, model: Any) -> None:
        self.whole, self.model = whole, model
        self.before = self._state()

    def _state(self) -> Any:
        hf = self.model.original_model
        return [(name, type(module).__name__) for name, module in hf.named_modules()], [
            n for n, p in hf.named_parameters() if p.requires_grad
        ]

    def __call__(self, path: Path) -> None:
        for file in self.whole.iterdir():
            if file.name != path.name and not (path.parent / file.name).exists():
                shutil.copyfile(file, path.parent / file.name)
        try:
            self.model.load_adapter(path.parent, "tuned")
            self.model(torch.tensor([[1, 9, 8]]))
            self.model.remove_adapter("tuned")
        finally:
            assert self.model.adapters == [] and self._state() == self.before, "the model is not as it was"


class _Rendered:
    """A tokenizer with another chat template: prompts are encoded as they stand, or refused."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def __call__(self, path: Path) -> None:
        self.tokenizer.chat_template = template = path.read_bytes().decode("utf-8", "replace")
        with suppress(ValueError):  # most do not mention it
            pin_arguments(self.tokenizer, {"thinking": True})
        self.tokenizer.chat_template = template
        for prompt in (Prompt(id="1", text="w1 w2"), Prompt(id="2", text="w3", system="w4")):
            (row,) = encode_prompts(self.tokenizer, [prompt])
            assert prompt.text in str(self.tokenizer.decode(list(row.ids[row.n_system :])))


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %} <system> {{ m.content }}"
    "{% elif m.role == 'user' %} <user> {{ m.content }}"
    "{% else %} <assistant> {{ m.content }} <end>{% endif %}{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"
)


def tiny_model(folder: Path, **changes: Any) -> Any:
    """A Llama of 2 blocks and width 32 with a tokenizer of 64 words."""
    special = ["<pad>", "<bos>", "<end>", "<unk>", "<system>", "<user>", "<assistant>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(57))])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **changes,
    }
    LlamaForCausalLM(
        LlamaConfig(vocab_size=64, max_position_embeddings=96, bos_token_id=1, eos_token_id=2, pad_token_id=0, **shape)
    ).save_pretrained(folder)
    return load_model(folder, device="cpu", check="off")
