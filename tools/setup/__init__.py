# SPDX-License-Identifier: Apache-2.0
"""What `python start.py` does before anything is installed: standard library only."""
