"""Dropout whose mask is a function of a key: the backward pass draws it again, nothing is kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorikeet.kernels import native

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
        """0 or 1 / (1 - p) in x's shape; int32 products wrap around as the hash wants them."""
        h = torch.arange(x.numel(), dtype=torch.int32, device=x.device)
        h ^= _signed(self.key)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            h ^= (h >> shift).bitwise_and_((1 << 32 - shift) - 1)  # a shift that brings in zeros
            h *= _signed(factor)
        h ^= _signed(1 << 31)  # unsigned words compare as signed ones with the top bit turned
        kept = (h >= _signed(self._threshold ^ 1 << 31)).view(x.shape)
        return kept.to(x.dtype).div_(1.0 - self.p)


def _signed(word: int) -> int:
    """The int32 with the same 32 bits."""
    return word - 2**32 if word >= 2**31 else word
