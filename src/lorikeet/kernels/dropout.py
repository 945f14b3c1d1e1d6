"""Dropout whose mask is a function of a key: the backward pass draws it again, nothing is kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorikeet.kernels import native

_WORD = 0xFFFFFFFF


NO_MASK = (0, 0, 1.0)
"""`Dropout.words` of a mask that keeps everything."""


@dataclass(frozen=True)
class Dropout:
    """A mask over the elements of a tensor, the same at every use.

    Element i is dropped where a hash of i and the key (Wellons' lowbias32) falls below
    p · 2^32; what is kept is scaled by 1 / (1 - p).

    Attributes:
        p: probability that an element is dropped, 0 to 1.
        key: 32 bits that tell this mask from all others.
    """

    p: float
    key: int

    def __call__(self, x: Tensor) -> Tensor:
        """x with its mask applied, a new tensor of x's shape and dtype."""
        if native.takes(x):
            y = torch.empty_like(x)
            self._native(x, y, add=False)
            return y
        return x * self._mask(x)

    def add_(self, y: Tensor, x: Tensor) -> Tensor:
        """Add x with its mask applied to y, in place: the gradient of `__call__`, accumulated."""
        if native.takes(y, x):
            self._native(x, y, add=True)
            return y
        return y.addcmul_(x, self._mask(x))

    @property
    def words(self) -> tuple[int, int, float]:
        """Key, threshold and scale: the mask as the compiled kernels take it."""
        return self.key, self._threshold, 1.0 / (1.0 - self.p)

    def _native(self, x: Tensor, y: Tensor, *, add: bool) -> None:
        native.call("lk_dropout", native.type_of(x), x.numel(), x, *self.words, int(add), y)

    @property
    def _threshold(self) -> int:
        return int(self.p * 2**32)

    def _mask(self, x: Tensor) -> Tensor:
        """0 or 1 / (1 - p) in x's shape. Words have 32 bits, kept in int64 for their products."""
        h = torch.arange(x.numel(), device=x.device) & _WORD ^ self.key
        h ^= h >> 16
        h = h * 0x7FEB352D & _WORD
        h ^= h >> 15
        h = _times(h, 0x846CA68B)
        h ^= h >> 16
        kept = (h >= self._threshold).view(x.shape)
        return kept.to(x.dtype) / (1.0 - self.p)


def _times(h: Tensor, factor: int) -> Tensor:
    """h · factor modulo 2^32 without leaving int64: factor has 32 bits, a product could have 64."""
    return (h * (factor & 0xFFFF) + ((h * (factor >> 16) & 0xFFFF) << 16)) & _WORD
