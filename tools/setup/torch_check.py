# SPDX-License-Identifier: Apache-2.0
"""Print one line of JSON about the torch of the Python that runs this file: version, build, devices that compute.

`environment.py` runs it inside .venv: a torch that ends the process or hangs must not take the set-up with it.
"""

from __future__ import annotations

import json

import torch


def build_name() -> str:
    """The build as pytorch.org's index calls it: cu130, rocm7.2, xpu, mps, cpu."""
    local = torch.__version__.partition("+")[2]
    if local:
        return local
    if torch.version.cuda:
        return f"cu{torch.version.cuda.replace('.', '')}"
    return "mps" if torch.backends.mps.is_built() else "cpu"


def computes(device: str) -> bool:
    """True when a small computation on the device gives its result: a card that is only listed is not enough."""
    try:
        return (torch.ones(2, device=device) * 2).sum().item() == 4
    except Exception:  # whatever a driver raises means the same here
        return False


def main() -> None:
    devices = [device for device in ("cuda", "xpu", "mps", "cpu") if computes(device)]
    print(json.dumps({"version": torch.__version__.partition("+")[0], "build": build_name(), "devices": devices}))


if __name__ == "__main__":
    main()
