"""What a run ran on."""

from __future__ import annotations

import platform

import onnxruntime
import torch

from stepwell.run.processes import num_launched


def hardware(device: torch.device) -> dict[str, str]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    several = {"processes": str(num_launched())} if num_launched() > 1 else {}
    return {
        "training device": name,
        **several,
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def processor() -> str:
    """The CPU's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
