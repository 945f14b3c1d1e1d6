"""What a Llama-like block does under LoRA, as autograd functions with hand-written backward passes.

Tensors in, tensors out: nothing here knows a model, an option or a batch. Every function computes
in the dtype of its input and works in float64 too, which is what its test compares it with. On
processors with AVX512-BF16 the row-wise parts and the attention run in compiled code (`native`);
on a GPU TorchInductor compiles the former (`fused`), and the latter is PyTorch's FlashAttention.

Shape legend of all files: T tokens, I inputs, O outputs, R the ranks of adapters that share an
input, laid side by side; H query heads, K key-value heads, D head size; S supervised rows, V
vocabulary, M width of the gates.
"""

from lorikeet.kernels.attention import attend
from lorikeet.kernels.dropout import Dropout
from lorikeet.kernels.int8 import Int8Weight, quantize_weight
from lorikeet.kernels.linear import Projection, project
from lorikeet.kernels.loss import head_nll
from lorikeet.kernels.mlp import gated_mlp
from lorikeet.kernels.norm import Normal, add_rms_norm, rms_norm
from lorikeet.kernels.rope import rotate

__all__ = [
    "Dropout",
    "Int8Weight",
    "Normal",
    "Projection",
    "add_rms_norm",
    "attend",
    "gated_mlp",
    "head_nll",
    "project",
    "quantize_weight",
    "rms_norm",
    "rotate",
]
