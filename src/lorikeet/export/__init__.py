"""Handing a tuned model on, and proof that what was handed on is what was tuned."""

from __future__ import annotations

from lorikeet.export.tolerance import Tolerance, tolerance_of
from lorikeet.export.verify import Material, Verification, Way, run_by, verify

__all__ = ["Material", "Tolerance", "Verification", "Way", "run_by", "tolerance_of", "verify"]
