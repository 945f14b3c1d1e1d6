"""Handing a tuned model on, and proof that what was handed on is what was tuned."""

from __future__ import annotations

from lorikeet.export.verify import Tolerance, Verification, Way, run_by, tolerance_of, verify

__all__ = ["Tolerance", "Verification", "Way", "run_by", "tolerance_of", "verify"]
