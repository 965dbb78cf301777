"""Public prompt sets and fine-tuning rows: fetched by the user, read in their own formats, split, and checked for leaks."""

from blockem_tl.sources.fetch import Source, catalogue, fetch, find_source
from blockem_tl.sources.prompt_files import PromptFile, load_prompt_file, load_prompts
from blockem_tl.sources.row_files import load_rows, write_rows
from blockem_tl.sources.splits import Split, heldout_prompts, leak_report, leave_out, split_rows

__all__ = [
    "PromptFile",
    "Source",
    "Split",
    "catalogue",
    "fetch",
    "find_source",
    "heldout_prompts",
    "leak_report",
    "leave_out",
    "load_prompt_file",
    "load_prompts",
    "load_rows",
    "split_rows",
    "write_rows",
]
