# SPDX-License-Identifier: Apache-2.0
"""Run by every Python that a process with the simulated card starts (simulate.py puts this folder on PYTHONPATH)."""

import os
import sys
from pathlib import Path

if os.environ.get("TRAINYARD_SIMULATED_CARD"):
    root = str(Path(__file__).resolve().parents[3])
    sys.path.append(root)
    from tests.cuda_simulation.simulate import simulate

    simulate()
    sys.path.remove(root)
