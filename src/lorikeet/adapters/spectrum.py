"""The singular values of an update, from its factors: W itself is never formed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lorikeet.adapters.adapter import Update


class Spectrum(NamedTuple):
    """scale · B A = U diag(S) V.

    Attributes:
        U: float64 [out, k], orthonormal columns; k is the rank or the smaller side of the weight.
        S: float64 [k], falling.
        V: float64 [k, in], orthonormal rows.
    """

    U: Tensor
    S: Tensor
    V: Tensor


def spectrum(update: Update) -> Spectrum:
    """The singular value decomposition of scale · B A, by QR of both factors, O((in + out) r²)."""
    left, inner_left = torch.linalg.qr(update.B.double() * update.scale)
    right, inner_right = torch.linalg.qr(update.A.double().t())
    U, S, V = torch.linalg.svd(inner_left @ inner_right.t(), full_matrices=False)
    return Spectrum(left @ U, S, V @ right.t())
