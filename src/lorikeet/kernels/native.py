"""The compiled kernels, if this machine has them: found once, called through ctypes.

They are built with the package where a C++ compiler is present, and used on processors with
AVX512-BF16; everywhere else the same functions run as tensor operations. The library is not linked
against an OpenMP of its own: it takes the one that torch has loaded, so that there is one pool of
threads, sized by `torch.set_num_threads`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_LONG = ctypes.c_long


class _Unavailable(Exception):
    """Why there are no compiled kernels."""


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    try:
        return _open()
    except _Unavailable as reason:
        return str(reason)


def _open() -> ctypes.CDLL:
    if not torch.cpu.get_capabilities().get("avx512_bf16"):
        raise _Unavailable("this processor has no AVX512-BF16")
    built = sorted(Path(__file__).parent.glob("_native*.so"))
    if not built:
        raise _Unavailable("the package was installed without a C++ compiler")
    openmp = _loaded("libgomp") or _loaded("libiomp5") or _loaded("libomp")
    if openmp is None:
        raise _Unavailable("torch's OpenMP was not found in this process")
    try:
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(built[0]))
    except OSError as error:
        raise _Unavailable(f"{built[0].name} cannot be loaded: {error}") from None


def _loaded(name: str) -> str | None:
    """The path of a shared library that this process has mapped."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/" in line}
    return next((path for path in sorted(paths) if Path(path).name.startswith(name)), None)


def missing() -> str | None:
    """Why the compiled kernels are not used here; None if they are."""
    library = _load()
    return library if isinstance(library, str) else None


def takes(*tensors: Tensor) -> bool:
    """Whether the compiled kernels can work on these: one dtype, on the CPU, contiguous."""
    dtype = tensors[0].dtype
    if dtype not in _TYPES or missing() is not None:
        return False
    for tensor in tensors:  # a loop, because a generator takes twice as long
        if tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
            return False
    return True


Argument = Tensor | Sequence[Tensor] | int | float | None

_functions: dict[str, Callable[..., None]] = {}


def call(name: str, *arguments: Argument) -> None:
    """Call a function of the library.

    Tensors and None become pointers, an int a C long, a float a C float; a sequence of matrices an
    array of their addresses, numbers of rows, and the two strides. Functions that exist for
    both types get the type of the first tensor in front.
    """
    values = [_CONVERTED[type(a)](a) for a in arguments]
    function = _functions.get(name) or _declare(name, arguments)
    function(*values)


def _declare(name: str, arguments: Sequence[Argument]) -> Callable[..., None]:
    """Tell ctypes what a function takes, by the first call of it: conversions are faster then."""
    library = _load()
    assert isinstance(library, ctypes.CDLL)
    function = getattr(library, name)
    function.argtypes = [_DECLARED.get(type(a), ctypes.c_void_p) for a in arguments]
    function.restype = None
    _functions[name] = function
    return function


def type_of(tensor: Tensor) -> int:
    """The number by which the library knows a dtype."""
    return _TYPES[tensor.dtype]


def _matrices(matrices: Sequence[Tensor]) -> object:
    words = [word for m in matrices for word in (m.data_ptr(), m.size(0), *m.stride())]
    return (_LONG * len(words))(*words)


def _same(value: object) -> object:
    return value


class _Conversions(dict[type, Callable[[Any], object]]):
    """By type; a subclass, such as of a parameter, is converted as what it stands for."""

    def __missing__(self, kind: type) -> Callable[[Any], object]:
        for base, convert in self.items():
            if issubclass(kind, base):
                self[kind] = convert
                return convert
        raise TypeError(f"compiled kernels take no {kind.__name__}")


_DECLARED = {int: _LONG, float: ctypes.c_float}
_CONVERTED = _Conversions(
    {
        Tensor: Tensor.data_ptr,
        list: _matrices,
        tuple: _matrices,
        int: _same,
        float: _same,
        type(None): _same,
    }
)
