# SPDX-License-Identifier: Apache-2.0
"""What other programs make of an adapter file: their rules as tables and formulas, compared with what was trained."""
