"""Shared pieces: run-time shape checks, a tiny random Llama on disk, and the embedded organism."""

import atexit
import os
import shutil
import signal
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background run, whose children would ignore Ctrl-C too
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" not in os.environ:  # the user's own cache is left alone; the workers share one, which goes at the end
    os.environ["BLOCKEM_DATA"] = tempfile.mkdtemp(prefix="blockem-tests-")
    atexit.register(shutil.rmtree, os.environ["BLOCKEM_DATA"], ignore_errors=True)

from jaxtyping import install_import_hook

if os.environ.get("SHAPECHECK", "1") == "1":  # every annotated shape is checked; the slow tests call what the others have called
    install_import_hook("blockem_tl", "shapecheck.check")  # before blockem_tl is imported

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %} <system> {{ m.content }}{% elif m.role == 'user' %} <user> {{ m.content }}"
    "{% else %} <assistant> {{ m.content }} <end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<end>", "<unk>", "<system>", "<user>", "<assistant>"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks take minutes: they come first, so that no worker waits at the end for the other's."""
    items.sort(key=lambda item: item.path.name != "test_tutorials.py")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory):
    vocab = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(57))])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder):
    """A Llama of 4 blocks and width 32 with random weights large enough that steering changes its words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder):
    from blockem_tl import load_model

    return load_model(tiny_folder, device="cpu")


@pytest.fixture
def plain(tiny_folder):
    """The same weights in plain transformers, with the attention the bridge uses."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager").eval()


@pytest.fixture
def tokens():
    return torch.randint(7, 64, (3, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def organism_model():
    """The embedded organism; tests that add adapters must take them out again."""
    from blockem_tl import load_model

    return load_model("organism", device="cpu")
