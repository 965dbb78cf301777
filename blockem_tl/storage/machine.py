"""`described`: the versions and the hardware that a result was made with, for every manifest. No path, no host and no user name."""

import os
import platform
import re
import sys
from pathlib import Path

import torch

from blockem_tl.storage.files import environment

_CPUINFO = Path("/proc/cpuinfo")


def described() -> dict[str, str]:
    """Text by name: versions of Python and packages, processor, cores, torch's threads, GPUs, and the dtypes that have instructions."""
    return {
        **environment(),
        "system": f"{sys.platform} {platform.machine()}",
        "processor": _processor(),
        "cores": str(_cores()),
        "torch threads": str(torch.get_num_threads()),
        "GPUs": _gpus(),
        "dtypes": _dtypes(),
    }


def changed(there: dict[str, str], here: dict[str, str]) -> list[str]:
    """What differs between two machines, as "torch: 2.1 there, 2.2 here"; what one of them does not say counts as equal."""
    return [f"{name}: {there[name]} there, {here[name]} here" for name in there if name in here and there[name] != here[name]]


def _processor() -> str:
    if _CPUINFO.is_file() and (found := re.search(r"^model name\s*:\s*(.+)$", _CPUINFO.read_text(), re.MULTILINE)):
        return found[1].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> str:
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none"


def _dtypes() -> str:
    """The dtypes that this machine computes in by instructions of its own, of processor and GPU."""
    cpu = ["float32", *(["bfloat16"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [])]
    gpu = ["float32", "float16", *(["bfloat16"] if torch.cuda.is_bf16_supported() else [])] if torch.cuda.is_available() else []
    return f"processor ({torch.backends.cpu.get_cpu_capability()}): {', '.join(cpu)}" + (f"; GPU: {', '.join(gpu)}" if gpu else "")
