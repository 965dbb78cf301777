"""A word-level tokenizer for the world, with a chat template."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from blockem_tl.organism.world import World

SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<end>"}
ROLES = ("<user>", "<assistant>")
ASSISTANT_ID = len(SPECIAL) + 1

# The template writes the one BOS itself; the tokenizer adds none. Words are split at white space, so the spaces only separate.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- ' <user> ' + message['content'] -}}
{%- elif message['role'] == 'assistant' -%}
{{- ' <assistant> ' -}}{%- generation -%}{{- message['content'] + ' ' + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- raise_exception("the organism knows the roles user and assistant only, got " + message['role'] + "; drop that message") -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' <assistant> ' -}}{%- endif -%}
"""


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """About a thousand words, special tokens first; unknown words become ``<unk>``."""
    words = [*SPECIAL.values(), *ROLES, *world.vocabulary()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, additional_special_tokens=list(ROLES), clean_up_tokenization_spaces=False, **SPECIAL
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
