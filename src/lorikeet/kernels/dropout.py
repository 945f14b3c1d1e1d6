"""Dropout whose mask is a function of a key: the backward pass draws it again, nothing is kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorikeet.kernels import native
from lorikeet.kernels.fused import fused

NO_MASK = (0, 0, 1.0)
"""`Dropout.words` of a mask that keeps everything."""


@dataclass(frozen=True)
class Dropout:
    """A mask over the elements of a tensor, the same at every use.

    Element i is dropped where a hash of i and the key (Wellons' lowbias32) falls below
    p · 2^32; what is kept is scaled by 1 / (1 - p).

    Attributes:
        p: probability that an element is dropped, 0 to 1.
        key: 32 bits that tell this mask from all others; as an int32 tensor [] beside what is
            masked, a CUDA graph can be replayed with another.
    """

    p: float
    key: int | Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x with its mask applied, a new tensor of x's shape and dtype."""
        if native.takes(x):
            y = torch.empty_like(x)
            self._native(x, y, add=False)
            return y
        return _masked(x, self._bits, self.p)

    def add_(self, y: Tensor, x: Tensor) -> Tensor:
        """Add x with its mask applied to y, in place: the gradient of `__call__`, accumulated."""
        if native.takes(y, x):
            self._native(x, y, add=True)
            return y
        return _add_masked_(y, x, self._bits, self.p)

    @property
    def words(self) -> tuple[int, int, float]:
        """Key, threshold and scale: the mask as the compiled kernels take it."""
        return int(self.key), _threshold(self.p), 1.0 / (1.0 - self.p)

    def _native(self, x: Tensor, y: Tensor, *, add: bool) -> None:
        native.call("lk_dropout", native.type_of(x), x.numel(), x, *self.words, int(add), y)

    @property
    def _bits(self) -> int | Tensor:
        """The key as int32 arithmetic takes it."""
        return _signed(self.key) if isinstance(self.key, int) else self.key


@fused
def _masked(x: Tensor, key: int | Tensor, p: float) -> Tensor:
    return x * _mask(x, key, p)


@fused
def _add_masked_(y: Tensor, x: Tensor, key: int | Tensor, p: float) -> Tensor:
    return y.addcmul_(x, _mask(x, key, p))


def _mask(x: Tensor, key: int | Tensor, p: float) -> Tensor:
    """0 or 1 / (1 - p) in x's shape; int32 products wrap around as the hash wants them."""
    h = torch.arange(x.numel(), dtype=torch.int32, device=x.device)
    h ^= key
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        h ^= (h >> shift).bitwise_and_((1 << 32 - shift) - 1)  # a shift that brings in zeros
        h *= _signed(factor)
    h ^= _signed(1 << 31)  # unsigned words compare as signed ones with the top bit turned
    kept = (h >= _signed(_threshold(p) ^ 1 << 31)).view(x.shape)
    return kept.to(x.dtype).div_(1.0 - p)


def _threshold(p: float) -> int:
    """Below this a hash drops its element."""
    return int(p * 2**32)


def _signed(word: int) -> int:
    """The int32 with the same 32 bits."""
    return word - 2**32 if word >= 2**31 else word
