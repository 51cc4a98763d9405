"""What figures were measured on: the processor, the instruction sets that matter here, the versions."""

from __future__ import annotations

import platform
from pathlib import Path

INSTRUCTION_SETS = ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8")


def arithmetic_of(device: object) -> tuple[str, str]:
    """What the last bits of values depend on: the parts of one result share them. Imports torch."""
    import torch

    return str(device), f"{torch.get_num_threads()} threads"


def describe_machine() -> dict[str, str]:
    """Facts for `dacc_run.json` and for tables; imports torch for its version and threads."""
    import diffusers
    import torch

    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    found = [name for name in INSTRUCTION_SETS if f" {name}" in text]
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": models[0] if models else platform.processor(),
        "instruction_sets": ", ".join(found),
        "accelerator": accelerator,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
