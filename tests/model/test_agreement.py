"""Which models get the fast path, and that a disagreement is noticed and said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from lorikeet import kernels
from lorikeet.kernels import native
from lorikeet.model import init_model, load_model, token_nll
from lorikeet.model.agreement import choose_nll
from lorikeet.model.fast import FastNll
from lorikeet.model.packing import enable_packing

CPU = torch.device("cpu")
_SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}
_BIASES = {"attention_bias": True, "mlp_bias": True}

Build = Callable[[str], Any]
Said = pytest.CaptureFixture[str]


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def packing(model: Any) -> Any:
    assert enable_packing(model, device=CPU)
    return model


def llama(**options: Any) -> Any:
    torch.manual_seed(4)
    return from_config(LlamaConfig(**_SIZES, **options))


def from_config(config: PretrainedConfig) -> Any:
    """A model whose weights are of the size that trained ones have."""
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    return packing(model)


def choice(model: Any, *, asked: str = "auto", packing: bool = True) -> tuple[Any, str]:
    return choose_nll(model, asked=asked, packing=packing)


def assert_refused(model: Any, reason: str, said: Said) -> None:
    """The model's own path, for a reason that is no cause for alarm."""
    nll, path_taken = choice(model)
    assert nll is token_nll
    assert path_taken == f"generic path: {reason}"
    assert said.readouterr().err == ""


def assert_disagrees(model: Any, said: Said) -> str:
    """The model's own path, and a warning; return what it says."""
    nll, path_taken = choice(model)
    assert nll is token_nll
    assert path_taken == "generic path: the fast one disagrees with it here"
    message = said.readouterr().err
    start = "warning: the fast path is not used: "
    assert message.startswith(start)
    assert message.count("\n") == 1
    return message.removeprefix(start)


TAKEN: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": lambda **tied: LlamaConfig(**_SIZES, **tied),
    "llama with biases": lambda **tied: LlamaConfig(**_SIZES, **_BIASES, **tied),
    "mistral": lambda **tied: MistralConfig(**_SIZES, sliding_window=5, **tied),
    "qwen2": lambda **tied: Qwen2Config(**_SIZES, **tied),
    "qwen3": lambda **tied: Qwen3Config(**_SIZES, **tied),
    "smollm3": lambda **tied: SmolLM3Config(**_SIZES, **tied),
}


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_taken(name: str, tied: bool, dtype: torch.dtype, capsys: Said) -> None:
    torch.manual_seed(4)
    model = from_config(TAKEN[name](tie_word_embeddings=tied)).to(dtype)
    nll, path_taken = choice(model)
    said = capsys.readouterr().err
    assert said == ""
    assert nll == FastNll()
    missing = native.missing()
    how = f"kernels in PyTorch ({missing})" if missing else "compiled kernels"
    assert path_taken == f"fast path, {how}"


def test_without_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", lambda: "this processor has no AVX512-BF16")
    nll, path_taken = choice(llama())
    assert isinstance(nll, FastNll)
    assert path_taken == "fast path, kernels in PyTorch (this processor has no AVX512-BF16)"


def test_off_as_asked(capsys: Said) -> None:
    assert choice(llama(), asked="off") == (token_nll, "generic path, as asked")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "model_type"),
    [("gpt2", "gpt2"), ("gemma", "gemma"), ("gpt-neox", "gpt_neox"), ("phi", "phi")],
)
def test_other_architectures(architecture: Build, name: str, model_type: str, capsys: Said) -> None:
    reason = f"its architecture ({model_type}) is not one of llama, mistral, qwen2, qwen3, smollm3"
    assert_refused(packing(architecture(name)), reason, capsys)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"hidden_act": "gelu"}, "its activation is gelu, not silu"),
        ({"attention_dropout": 0.1}, "it drops attention weights (attention_dropout 0.1)"),
    ],
)
def test_llamas_that_are_not_taken(options: dict[str, Any], reason: str, capsys: Said) -> None:
    assert_refused(llama(**options), reason, capsys)


def test_angles_that_follow_the_longest_document(capsys: Said) -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = from_config(LlamaConfig(**_SIZES, rope_parameters=scaling))
    assert_refused(model, "its rotary angles follow the longest document of a row", capsys)


def test_documents_that_cannot_share_a_row(capsys: Said) -> None:
    nll, path_taken = choice(llama(), packing=False)
    assert (nll, path_taken) == (token_nll, "generic path: its documents cannot share a row")
    assert capsys.readouterr().err == ""


def test_the_trial_leaves_no_trace(dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    choice(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_a_model_that_is_loaded_where_gradients_are_off(capsys: Said) -> None:
    """As for an evaluation: the trial needs gradients all the same."""
    with torch.no_grad():
        model = llama()
        nll, path_taken = choice(model)
    assert isinstance(nll, FastNll), path_taken
    assert capsys.readouterr().err == ""


def turned_the_other_way(rotate: Any) -> Any:
    return lambda x, cos, sin: rotate(x, cos, -sin)


def unturned(_: Any) -> Any:
    return lambda x, cos, sin: x


def without_weight(add_rms_norm: Any) -> Any:
    return lambda x, delta, weight, eps: add_rms_norm(x, delta, 0 * weight + 1, eps)


def without_residual(add_rms_norm: Any) -> Any:
    return lambda x, delta, weight, eps: add_rms_norm(0 * x, delta, weight, eps)


def without_bias(project: Any) -> Any:
    return lambda x, projections, **options: project(
        x, [p._replace(bias=0 * p.bias) for p in projections], **options
    )


class _HalfTheSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 0.5 * gradient


def right_but_for_the_gradient(add_rms_norm: Any) -> Any:
    return lambda x, delta, weight, eps: add_rms_norm(x, delta, _HalfTheSlope.apply(weight), eps)


def nan_in_the_gradient(gated_mlp: Any) -> Any:
    def wrong(x: Tensor, *maps: Any, **options: Any) -> Tensor:
        y = gated_mlp(x, *maps, **options)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * float("nan"))
        return y

    return wrong


def too_much(head_nll: Any) -> Any:
    return lambda *arguments, **options: head_nll(*arguments, **options) * 1.5


WRONG = [
    ("rotate", turned_the_other_way, "the output of its first block is "),
    ("rotate", unturned, "the output of its first block is "),
    ("add_rms_norm", without_weight, "the output of its first block is "),
    ("add_rms_norm", without_residual, "the output of its first block is "),
    ("project", without_bias, "the output of its first block is "),
    ("gated_mlp", nan_in_the_gradient, "the gradient of "),
    ("head_nll", too_much, "loss"),
]


@pytest.mark.parametrize(("name", "wrong", "said"), WRONG)
def test_a_disagreement_is_noticed(
    name: str,
    wrong: Callable[[Any], Any],
    said: str,
    dtype: torch.dtype,
    capsys: Said,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama(**_BIASES)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.normal_(1, 0.5)
    monkeypatch.setattr(kernels, name, wrong(getattr(kernels, name)))
    found = assert_disagrees(model.to(dtype), capsys)
    assert said in found
    assert " off (at most " in found
    assert any(character.isdigit() for character in found) or "nan" in found


def test_a_wrong_gradient_is_named(capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = right_but_for_the_gradient(kernels.add_rms_norm)
    monkeypatch.setattr(kernels, "add_rms_norm", wrong)
    found = assert_disagrees(llama(), capsys)
    expected = "the gradient of input_layernorm.weight of its first block is 5.0e-01 off"
    assert found == f"{expected} (at most 1e-04)\n"


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not fit"), TypeError("no such"), IndexError("beyond")]
)
@pytest.mark.parametrize("name", ["add_rms_norm", "project", "rotate", "gated_mlp", "head_nll"])
def test_a_kernel_that_fails(
    name: str, error: Exception, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(kernels, name, fail)
    found = assert_disagrees(llama(), capsys)
    assert found == f"{type(error).__name__}: {error}\n"


def test_a_layer_that_it_does_not_know(capsys: Said) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = llama()
    model.model.layers[0].mlp.up_proj = Doubled(32, 40, bias=False)
    assert "cannot run a Doubled" in assert_disagrees(model, capsys)


def test_a_later_block_that_is_different(capsys: Said) -> None:
    """The first block is compared with its gradients, all of them by the losses."""
    model = llama()
    last = model.model.layers[1].mlp
    last.register_forward_hook(lambda module, inputs, output: -output)
    assert "loss" in assert_disagrees(model, capsys)


@pytest.fixture
def folder(architecture: Build, tokenizer: Any, tmp_path: Path) -> Path:
    architecture("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_loaded_model_has_its_loss(folder: Path) -> None:
    options = {"dtype": "fp32", "device": "cpu"}
    for base in (load_model(folder, **options), init_model(folder, seed=0, **options)):
        assert isinstance(base.nll, FastNll)
        assert base.path_taken.startswith("fast path, ")
    for base in (
        load_model(folder, fast="off", **options),
        init_model(folder, seed=0, fast="off", **options),
    ):
        assert (base.nll, base.path_taken) == (token_nll, "generic path, as asked")
