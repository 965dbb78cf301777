"""The part inside vLLM's workers: every request has its own vectors, added to the residual stream after chosen blocks.

The vectors stand in one table per block, and every token of the running batch carries the number of its row. Tables and numbers are fixed
tensors that each step only fills, so the hooks that read them may be compiled and captured in CUDA graphs: they have to be there when
the model is loaded, which is why this is a worker class and not an extension of one (whose hooks compiled code ignores in silence).

What vLLM keeps to itself is used in `Steering` alone; tests/generation/test_vllm_engine.py pins it, so that an upgrade is noticed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports] - lives in an environment of its own

from blockem_tl.generation.vllm.jobs import SETTINGS, VERSION

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker  # pyright: ignore[reportMissingImports]
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker  # pyright: ignore[reportMissingImports]

PRIVATE = ("_prepare_inputs", "_make_buffer", "max_num_tokens", "requests", "input_batch")
"""What `Steering` uses of vLLM's V1 model runner."""


class SteeringWorker(PlatformWorker):  # pyright: ignore[reportGeneralTypeIssues]
    """vLLM's own worker, with `Steering` in its model."""

    steering: "Steering"

    def load_model(self, **options: Any) -> None:
        """Load the model as vLLM does, and hang the steering into it."""
        super().load_model(**options)
        settings = self.vllm_config.additional_config[SETTINGS]
        with torch.inference_mode(False):
            self.steering = Steering(self.model_runner, blocks=settings["blocks"], rows=settings["rows"])

    def set_vectors(self, added: Sequence[tuple[int, Sequence[tuple[int, bytes]]]], dropped: Sequence[int]) -> None:
        """See `Steering.set_vectors`; called by the engine in its own process."""
        self.steering.set_vectors(added, dropped)


class Steering:
    """The tables of one worker, and the hooks that add them.

    blocks: indices of the blocks to hook.  rows: conditions held at once; row 0 stays zero, for tokens that only pad the batch.
    """

    def __init__(self, runner: Any, *, blocks: Sequence[int], rows: int) -> None:
        missing = [name for name in PRIVATE if not hasattr(runner, name)]
        if missing:
            raise RuntimeError(f"this vLLM's {type(runner).__name__} has no {missing}: blockem_tl steers vLLM {VERSION}, install that")
        config = runner.model_config
        layers = decoder_layers(runner.get_model(), config.hf_text_config.num_hidden_layers)
        self._runner, self._blocks = runner, list(blocks)
        self._tables = torch.zeros(len(blocks), rows, config.hf_text_config.hidden_size, dtype=config.dtype, device=runner.device)
        self._row_of_token = runner._make_buffer(runner.max_num_tokens, dtype=torch.int64)
        self._row_of: dict[int, int] = {}
        self._free = list(range(rows - 1, 0, -1))
        for table, block in zip(self._tables, blocks, strict=True):
            # as buffers, because compiled code takes a module's buffers as it takes its weights
            layers[block].register_buffer("steering_table", table, persistent=False)
            layers[block].register_buffer("steering_rows", self._row_of_token.gpu, persistent=False)
            layers[block].register_forward_hook(add_vectors)
        self._prepare_inputs, runner._prepare_inputs = runner._prepare_inputs, self._with_rows

    def set_vectors(self, added: Sequence[tuple[int, Sequence[tuple[int, bytes]]]], dropped: Sequence[int]) -> None:
        """Forget the conditions ``dropped``, then learn those ``added``: (condition, [(block, its vector as float32 bytes), ...])."""
        for condition in dropped:
            self._free.append(self._row_of.pop(condition))
        for condition, vectors in added:
            row = self._row_of[condition] = self._free.pop()
            self._tables[:, row] = 0
            for block, data in vectors:
                self._tables[self._blocks.index(block), row] = torch.frombuffer(bytearray(data), dtype=torch.float32).to(self._tables)

    def _with_rows(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray, *args: Any, **kwargs: Any) -> Any:
        """vLLM's own step that lays the requests' tokens out in one batch, and the row number of each token beside it."""
        rows = [self._row(request) for request in self._runner.input_batch.req_ids]
        n = int(num_scheduled_tokens.sum())
        self._row_of_token.np[:n] = np.repeat(rows, num_scheduled_tokens)
        self._row_of_token.copy_to_gpu(n)
        if self._runner.device.type == "cpu":
            self._spare_generators(num_scheduled_tokens)
        return self._prepare_inputs(scheduler_output, num_scheduled_tokens, *args, **kwargs)

    def _spare_generators(self, num_scheduled_tokens: np.ndarray) -> None:
        """Keep the seeded generator of a prompt that is only part done out of this step, whose token for it vLLM throws away.

        vLLM would rewind the generator afterwards, which those of the CPU cannot do: "CPU Generator does not use offset" ends the engine.
        """
        batch = self._runner.input_batch
        for i, request in enumerate(batch.req_ids):
            state = self._runner.requests[request]
            if state.generator is None:
                continue
            if batch.num_computed_tokens_cpu[i] + num_scheduled_tokens[i] < state.num_tokens:
                batch.generators.pop(i, None)
            else:
                batch.generators[i] = state.generator

    def _row(self, request: str) -> int:
        condition = (self._runner.requests[request].sampling_params.extra_args or {}).get(SETTINGS)
        if condition not in self._row_of:
            raise RuntimeError(f"request {request} belongs to no condition that this worker knows ({condition}): it would go unsteered")
        return self._row_of[condition]


def add_vectors(layer: Any, args: Any, output: Any) -> Any:
    """Forward hook of a block. Where vLLM returns (hidden, residual), their sum is the residual stream: adding to the first is enough."""
    hidden, *rest = output if isinstance(output, tuple) else (output,)
    rows = layer.steering_rows[: hidden.shape[-2]]  # [n_tokens d_model], or [1 n_tokens d_model] where transformers models the layer
    steered = hidden + layer.steering_table[rows]
    return (steered, *rest) if isinstance(output, tuple) else steered


def decoder_layers(model: nn.Module, n: int) -> nn.ModuleList:
    """The model's list of ``n`` decoder blocks. Raises RuntimeError where no list, or more than one, has that length."""
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == n]
    if len(found) != 1:
        raise RuntimeError(f"cannot steer {type(model).__name__}: expected one list of {n} decoder blocks, found {len(found)}")
    return found[0]
