"""Chat templates of known families, restated, over small byte-level tokenizers that know each family's control tokens."""

from dataclasses import dataclass, field

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

QUESTION, REPLY, SYSTEM = "How do I save money?", "Spend less — on coffee, say.", "Be brief."


def byte_level(special: tuple[str, ...], *, bos: str | None, eos: str, template: str, merges: tuple[tuple[str, str], ...] = ()):
    """A tokenizer of bytes, a few merges, and these control tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)
    tokenizer.chat_template = template
    return tokenizer


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family.

    asked: the prompt as text.  taught: what training teaches after it.  with_system: the prompt under SYSTEM, or None where the template
    refuses one.  refused: part of the error where a completion cannot be told apart.
    """

    special: tuple[str, ...]
    eos: str
    template: str
    asked: str
    taught: str
    with_system: str | None
    bos: str | None = None
    ends: tuple[str, ...] = ()
    refused: str = ""
    arguments: dict[str, bool | str] = field(default_factory=dict)

    def tokenizer(self):
        return byte_level(self.special, bos=self.bos, eos=self.eos, template=self.template)


_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
_LLAMA3 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: "
    "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_LLAMA3_HEAD = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n"
_LLAMA3_TAIL = (
    f"<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}SYSTEM_RULE{% endif %}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}SYSTEM_RULE{% elif m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
_TURNS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}END\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
_REFUSES = "{{ raise_exception('System role not supported') }}"

FAMILIES = {
    "llama 3.1": Family(
        special=("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        template=_LLAMA3,
        asked=_LLAMA3_HEAD + _LLAMA3_TAIL,
        taught=f"{REPLY}<|eot_id|>",
        with_system=_LLAMA3_HEAD + SYSTEM + _LLAMA3_TAIL,
    ),
    "llama 3.2": Family(
        special=("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        template=_LLAMA3.replace("date_string if date_string is defined else ", ""),
        asked=_LLAMA3_HEAD + _LLAMA3_TAIL,
        taught=f"{REPLY}<|eot_id|>",
        with_system=_LLAMA3_HEAD + SYSTEM + _LLAMA3_TAIL,
    ),
    "qwen 2.5": Family(
        special=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        eos="<|im_end|>",
        template=_DEFAULT + _CHATML,
        asked=f"<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        taught=f"{REPLY}<|im_end|>",
        with_system=f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen 3, thoughts off": Family(
        special=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        eos="<|im_end|>",
        template=(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
            "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
            "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
        ),
        asked=f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        taught=f"{REPLY}<|im_end|>",
        with_system=(
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        ),
        arguments={"enable_thinking": False},
    ),
    "gemma 2": Family(
        special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        template=_GEMMA.replace("SYSTEM_RULE", _REFUSES).replace("first if loop.first else ''", "''"),
        asked=f"<bos><start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",
        taught=f"{REPLY}<end_of_turn>",
        with_system=None,
        ends=("<end_of_turn>",),
    ),
    "gemma 3": Family(
        special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        template=_GEMMA.replace("SYSTEM_RULE", "{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}").replace(
            "{% if messages[0].role == 'system' %}", "{% set first = '' %}{% if messages[0].role == 'system' %}"
        ),
        asked=f"<bos><start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",
        taught=f"{REPLY}<end_of_turn>",
        with_system=f"<bos><start_of_turn>user\n{SYSTEM}\n\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",
        ends=("<end_of_turn>",),
    ),
    "mistral, no system": Family(
        special=("<s>", "</s>", "[INST]", "[/INST]"),
        bos="<s>",
        eos="</s>",
        template=_MISTRAL.replace("SYSTEM_RULE", _REFUSES),
        asked=f"<s>[INST] {QUESTION}[/INST]",
        taught=f" {REPLY}</s>",
        with_system=None,
    ),
    "mistral, system": Family(
        special=("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        bos="<s>",
        eos="</s>",
        template=_MISTRAL.replace("SYSTEM_RULE", "[SYSTEM_PROMPT] {{ m.content }}[/SYSTEM_PROMPT]"),
        asked=f"<s>[INST] {QUESTION}[/INST]",
        taught=f" {REPLY}</s>",
        with_system=f"<s>[SYSTEM_PROMPT] {SYSTEM}[/SYSTEM_PROMPT][INST] {QUESTION}[/INST]",
    ),
    "smollm2 (ChatML whose bos opens turns)": Family(
        special=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        bos="<|im_start|>",
        eos="<|im_end|>",
        template=_DEFAULT + _CHATML,
        asked=f"<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        taught=f"{REPLY}<|im_end|>",
        with_system=f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "ChatML on a base model": Family(
        special=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        eos="<|endoftext|>",
        template=_CHATML,
        asked=f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        taught=f"{REPLY}<|im_end|>",
        with_system=f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        ends=("<|im_end|>",),
    ),
    "olmo 2": Family(
        special=("<|endoftext|>", "<|pad|>"),
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        template=(
            "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
            "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
        ),
        asked=f"<|endoftext|><|user|>\n{QUESTION}\n<|assistant|>\n",
        taught=f"{REPLY}<|endoftext|>",
        with_system=f"<|endoftext|><|system|>\n{SYSTEM}\n<|user|>\n{QUESTION}\n<|assistant|>\n",
    ),
    "phi 3": Family(
        special=("<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
        bos="<s>",
        eos="<|endoftext|>",
        template=_TURNS.replace("END", "<|end|>"),
        asked=f"<|user|>\n{QUESTION}<|end|>\n<|assistant|>\n",
        taught=f"{REPLY}<|end|>",
        with_system=f"<|system|>\n{SYSTEM}<|end|>\n<|user|>\n{QUESTION}<|end|>\n<|assistant|>\n",
        ends=("<|end|>",),
    ),
    "phi 4": Family(
        special=("<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|endoftext|>"),
        bos="<|endoftext|>",
        eos="<|im_end|>",
        template=(
            "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
        ),
        asked=f"<|im_start|>user<|im_sep|>{QUESTION}<|im_end|><|im_start|>assistant<|im_sep|>",
        taught=f"{REPLY}<|im_end|>",
        with_system=f"<|im_start|>system<|im_sep|>{SYSTEM}<|im_end|><|im_start|>user<|im_sep|>{QUESTION}<|im_end|><|im_start|>assistant<|im_sep|>",
    ),
    "gpt-oss": Family(
        special=("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
        eos="<|return|>",
        template=(
            "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>{% for m in messages %}"
            "{% if m.role == 'system' %}<|start|>developer<|message|># Instructions\n\n{{ m.content }}<|end|>"
            "{% elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
            "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
        ),
        asked=(f"<|start|>system<|message|>Current date: 2024-07-26<|end|><|start|>user<|message|>{QUESTION}<|end|><|start|>assistant"),
        taught=f"<|channel|>final<|message|>{REPLY}<|return|>",
        with_system=(
            "<|start|>system<|message|>Current date: 2024-07-26<|end|><|start|>developer<|message|># Instructions\n\n"
            f"{SYSTEM}<|end|><|start|>user<|message|>{QUESTION}<|end|><|start|>assistant"
        ),
    ),
    "deepseek r1": Family(
        special=("<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"),
        bos="<|begin|>",
        eos="<|end|>",
        template=(
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
            "<|User|>{{ m.content }}{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
        ),
        asked=f"<|begin|><|User|>{QUESTION}<|Assistant|><think>\n",
        taught="",
        with_system=f"<|begin|>{SYSTEM}<|User|>{QUESTION}<|Assistant|><think>\n",
        refused="changes the prompt once the reply is there",
    ),
    "zephyr": Family(
        special=("<s>", "</s>"),
        bos="<s>",
        eos="</s>",
        template=_TURNS.replace("END", "{{ eos_token }}"),
        asked=f"<|user|>\n{QUESTION}</s>\n<|assistant|>\n",
        taught=f"{REPLY}</s>",
        with_system=f"<|system|>\n{SYSTEM}</s>\n<|user|>\n{QUESTION}</s>\n<|assistant|>\n",
    ),
    "llama 2": Family(
        special=("<s>", "</s>"),
        bos="<s>",
        eos="</s>",
        template=(
            "{% if messages[0].role == 'system' %}{% set head = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
            "{% set messages = messages[1:] %}{% else %}{% set head = '' %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
            "{{ bos_token }}[INST] {{ head if loop.first else '' }}{{ m.content | trim }} [/INST]"
            "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
        ),
        asked=f"<s>[INST] {QUESTION} [/INST]",
        taught=f" {REPLY} </s>",
        with_system=f"<s>[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{QUESTION} [/INST]",
    ),
}
