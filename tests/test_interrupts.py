"""A cell that is interrupted leaves the model as it was: no hooks, the adapters that there were, no partial files. A real kernel, real interrupts."""

import time
from collections.abc import Iterator

import pytest
from jupyter_client.manager import start_new_kernel

SETUP = """
import os, pathlib, torch
torch.set_num_threads(1)
from dataclasses import replace
from blockem_tl import *
from blockem_tl import organism

setting = Setting.of("organism")
model, sae, judge = setting.model, setting.sae, setting.judge
core, rows = setting.prompts("core"), setting.rows(n=600)
model.add_adapter("tuned", rank=4)
torch.manual_seed(0)
for parameter in model.adapter_parameters("tuned"):
    parameter.data.normal_(std=0.1)
scale = setting.scale()
blocking = Blocking(latent_set=random_latents(sae, 5, seed=0), sae=sae, weight=1.0)
steering = [Condition(name=str(d), steering=(Steering(site=setting.site, direction=direction, dose=d / 10, scale=scale),))
            for d in range(40) for direction in decoder_directions(sae, [0])]
folder = pathlib.Path(FOLDER)

def state():
    hooks = {name for name, point in model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks}
    torch_hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.original_model.modules())
    weights = {name: [p.sum().item() for p in model.adapter_parameters(name)] for name in model.adapters}
    trainable = sorted(n for n, p in model.hf.named_parameters() if p.requires_grad)
    replies = [r.reply for r in generate(model, core[:8], max_new_tokens=12, progress=False)]
    return hooks, torch_hooks, model.adapters, model.active_adapter, weights, trainable, model.original_model.training, replies
"""

LONG = {
    "generate": "generate(model, core, conditions=steering, max_new_tokens=20, batch_size=64, adapter='tuned')",
    "finetune": "finetune(model, rows, config=replace(setting.training, epochs=50, batch_size=16), adapter='new', defences=[blocking], "
    "checkpoints=folder / 'checkpoints-DELAY', save_every_epochs=0.05)",
    "discover": "discover(model, sae, judge, core, adapter='tuned', scale=scale, config=setting.preset.discovery, store=folder / 's.sqlite')",
    "sweep": "patching_sweep(model, core, target='tuned', when=['prompt', 'decode'], max_new_tokens=20, batch_size=8)",
}


class Kernel:
    """A notebook's kernel."""

    def __init__(self) -> None:
        self.manager, self.client = start_new_kernel(kernel_name="python3")

    def run(self, code: str, interrupt_after: float | None = None) -> tuple[str, str]:
        """Run a cell; returns its status ("ok", or the error's name) and what it printed."""
        message, printed, sent = self.client.execute(code), "", interrupt_after is None
        start = time.monotonic()
        while True:
            if not sent and time.monotonic() - start > interrupt_after:
                self.manager.interrupt_kernel()
                sent = True
            try:
                got = self.client.get_iopub_msg(timeout=0.05)
            except Exception:  # nothing was said meanwhile
                assert time.monotonic() - start < 240, "the cell hangs"
                continue
            if got["parent_header"].get("msg_id") != message:
                continue
            if got["msg_type"] == "stream":
                printed += got["content"]["text"]
            if got["msg_type"] == "error":
                printed += "\n".join(got["content"]["traceback"])
            if got["msg_type"] == "status" and got["content"]["execution_state"] == "idle":
                break
        reply = self.client.get_shell_msg(timeout=60)
        while reply["parent_header"].get("msg_id") != message:  # a slow kernel answers some questions twice when it starts
            reply = self.client.get_shell_msg(timeout=60)
        found = reply["content"]
        return ("ok" if found["status"] == "ok" else found["ename"]), printed

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Iterator[Kernel]:
    made = Kernel()
    made.folder = tmp_path_factory.mktemp("interrupted")
    status, said = made.run(SETUP.replace("FOLDER", repr(str(made.folder))))
    assert status == "ok", said
    yield made
    made.close()


def whole(folder) -> bool:
    """Whether every checkpoint there is whole, and nothing else lies there but stores."""
    for path in folder.rglob("*"):
        if path.is_file() and (".tmp" in path.name or (path.name.startswith(".") and path.suffix not in (".lock",))):
            return False
    needed = {"adapter_config.json", "adapter_model.safetensors"}
    return all(needed <= {p.name for p in one.iterdir()} for one in folder.glob("checkpoints-*/epoch-*"))


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.05, 0.6, 1.7, 4.0])
@pytest.mark.parametrize("cell", LONG)
def test_an_interrupted_cell_leaves_nothing_behind(kernel: Kernel, cell: str, delay: float) -> None:
    assert kernel.run("before = state()")[0] == "ok"
    status, said = kernel.run(LONG[cell].replace("DELAY", str(delay)), interrupt_after=delay)
    assert status == "KeyboardInterrupt", f"{status}: {said[-600:]}"
    status, said = kernel.run("after = state()\nassert before == after, [(a, b) for a, b in zip(before, after) if a != b]")
    assert status == "ok", said[-1500:]
    assert whole(kernel.folder), sorted(str(p) for p in kernel.folder.rglob("*"))


@pytest.mark.slow
def test_what_is_left_behind_would_be_noticed(kernel: Kernel) -> None:
    kernel.run("before = state()")
    kernel.run("model.add_hook(setting.site, lambda activation, hook: activation * 0)")
    status, _ = kernel.run("assert before == state()")
    kernel.run("model.reset_hooks()")
    assert status == "AssertionError"
    assert kernel.run("assert before == state()")[0] == "ok"


@pytest.mark.slow
def test_bars_show_themselves_in_a_notebook_and_one_variable_turns_them_off(kernel: Kernel) -> None:
    cell = "generate(model, core[:4], max_new_tokens=5)\nload_model('organism')\npreference(model, setting.pairs('core')[:4])\nNone"
    message = kernel.client.execute(cell)
    shown = bars(kernel, message)
    assert {"replies", "preference"} <= shown
    kernel.run("os.environ['BLOCKEM_PROGRESS'] = '0'")
    assert bars(kernel, kernel.client.execute(cell)) == set()
    kernel.run("del os.environ['BLOCKEM_PROGRESS']")


def bars(kernel: Kernel, message: str) -> set[str]:
    """Descriptions of the bars that a cell shows."""
    text = ""
    while True:
        got = kernel.client.get_iopub_msg(timeout=120)
        if got["parent_header"].get("msg_id") != message:
            continue
        if got["msg_type"] in ("display_data", "update_display_data", "stream", "comm_open", "comm_msg"):
            text += repr(got["content"])
        if got["msg_type"] == "status" and got["content"]["execution_state"] == "idle":
            break
    kernel.client.get_shell_msg(timeout=10)
    return {word for word in ("replies", "preference", "Loading weights") if word in text}
