"""GGUF, the file format of llama.cpp: its block formats, its mixtures of types, its container.

Tensors in, bytes out and back: nothing here knows a model folder or a tokenizer. Everything is
Python and numpy, so that it works where there is no compiler and no llama.cpp.
"""

from lorikeet.gguf.blocks import TYPES, BlockType, decode, encode, row_bytes
from lorikeet.gguf.metadata import Field
from lorikeet.gguf.mixture import KINDS, Assigned, assign, file_type
from lorikeet.gguf.read import GGUFFile, TensorInfo, open_gguf
from lorikeet.gguf.write import Stored, write_gguf

__all__ = [
    "KINDS",
    "TYPES",
    "Assigned",
    "BlockType",
    "Field",
    "GGUFFile",
    "Stored",
    "TensorInfo",
    "assign",
    "decode",
    "encode",
    "file_type",
    "open_gguf",
    "row_bytes",
    "write_gguf",
]
