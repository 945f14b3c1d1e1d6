"""The fast path against the model's own forward pass, on tiny random models of what it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
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
from lorikeet.config import LoraConfig
from lorikeet.data import Example, pack
from lorikeet.data.batch import Batch
from lorikeet.kernels import Projection, native
from lorikeet.lora import LoraLinear, disabled, inject, lora_parameters
from lorikeet.model import load_model, token_nll
from lorikeet.model.fast import FastNll
from lorikeet.model.packing import enable_packing

CPU = torch.device("cpu")
VOCABULARY = 61
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden size over heads
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_TIED = {**_SIZES, "tie_word_embeddings": True}
_WINDOW = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}
_ANGLES = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA3 = {**_ANGLES, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {**_ANGLES, "rope_type": "yarn", "original_max_position_embeddings": 64}

MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "llama tied": lambda: LlamaConfig(**_TIED),
    "llama with biases": lambda: LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "llama 3 angles": lambda: LlamaConfig(**_TIED, rope_parameters=_LLAMA3),
    "yarn angles": lambda: LlamaConfig(**_SIZES, rope_parameters=_YARN),
    "one head": lambda: LlamaConfig(
        **{**_SIZES, "num_attention_heads": 1, "num_key_value_heads": 1}
    ),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=8),
    "mistral without a window": lambda: MistralConfig(**_SIZES, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_TIED),
    "qwen2 with a window": lambda: Qwen2Config(**_SIZES, **_WINDOW),
    "qwen3": lambda: Qwen3Config(**_TIED),
    "qwen3 with a window": lambda: Qwen3Config(**_SIZES, **_WINDOW),
    "smollm3": lambda: SmolLM3Config(**_TIED, no_rope_layers=[1, 0, 1]),
    "smollm3 without rope at first": lambda: SmolLM3Config(**_SIZES, no_rope_layers=[0, 1, 0]),
}

Gradients = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


def build(name: str, *, dtype: torch.dtype = torch.float32) -> Any:
    """A random model in whose losses every weight, norm and bias has its say."""
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(MODELS[name]()).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.3 / parameter.shape[1] ** 0.5)
            elif key.endswith("bias"):
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(1.0, 0.2)
    assert enable_packing(model, device=CPU)
    return model.to(dtype)


def adapt(model: Any, **options: Any) -> Any:
    """Inject LoRA whose A and B are both at work."""
    inject(model, LoraConfig(**{"r": 4, "alpha": 6.0, **options}), seed=3)
    generator = torch.Generator().manual_seed(2)
    for parameter in lora_parameters(model).values():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def document(length: int, seed: int, *, share: float = 0.6) -> Example:
    """A random document of which about a share is supervised."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (length,), generator=generator)
    counted = torch.rand(length, generator=generator) < share
    counted[0] = False
    return Example(tuple(ids.tolist()), tuple(counted.tolist()), 0, "test")


def packed(*lengths: int, share: float = 0.6) -> Batch:
    return pack([document(length, seed, share=share) for seed, length in enumerate(lengths)])


def some_batch() -> Batch:
    """A document longer than the windows, short ones, one token, and one that only reads."""
    documents = [document(length, seed) for seed, length in enumerate((17, 2, 1, 29, 23))]
    return pack([*documents, document(11, 9, share=0.0)])


def gradients(loss: Loss, model: nn.Module, batch: Batch) -> tuple[Tensor, Gradients]:
    """The losses [S], and the gradient of an uneven sum of them for all that is trained."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses = loss(model, batch)
    weights = torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype)
    found = torch.autograd.grad((losses * weights).sum(), list(trained.values()))
    return losses.detach(), dict(zip(trained, found, strict=True))


def assert_agree(
    found: tuple[Tensor, Gradients],
    expected: tuple[Tensor, Gradients],
    *,
    loss: float,
    slope: float,
) -> None:
    assert found[0].dtype == expected[0].dtype
    assert_close(found[0], expected[0], rtol=loss, atol=loss)
    assert_gradients(found[1], expected[1], slope)


def assert_gradients(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float
) -> None:
    assert found.keys() == expected.keys() != set()
    for name, exact in expected.items():
        assert found[name].dtype == exact.dtype
        assert exact.any(), f"{name} has nothing to learn here"
        error = (found[name].double() - exact.double()).norm() / exact.double().norm()
        assert error < tolerance, f"{name}: {error:.1e} off"


def assert_same(found: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients]) -> None:
    assert torch.equal(found[0], expected[0])
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name


@pytest.fixture(params=["compiled", "tensor operations"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "tensor operations":
        monkeypatch.setattr(native, "missing", lambda: "the test wants tensor operations")
    elif native.missing() is not None:
        pytest.skip(f"no compiled kernels: {native.missing()}")
    yield


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
def test_in_float32(name: str, adapted: bool) -> None:
    model, batch = build(name), some_batch()
    model = adapt(model) if adapted else model
    expected = gradients(token_nll, model, batch)
    learning = lora_parameters(model) if adapted else dict(model.named_parameters())
    assert set(expected[1]) == set(learning)
    assert_agree(gradients(FastNll(), model, batch), expected, loss=1e-5, slope=1e-4)


def wide_norm(norm: Any, x: Tensor) -> Tensor:
    """transformers' norm in the dtype of its input; its own is float32 even for float64."""
    return norm.weight * (x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
def test_in_float64(name: str, adapted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(name), some_batch()
    model = (adapt(model) if adapted else model).double()
    monkeypatch.setattr(type(model.model.norm), "forward", wide_norm)
    expected = gradients(token_nll, model, batch)
    assert expected[0].dtype == torch.float64
    assert_agree(gradients(FastNll(), model, batch), expected, loss=1e-9, slope=1e-9)


@pytest.mark.parametrize("lengths", [(1, 3), (64,), (65,), (33, 31), (130, 5, 70)])
def test_rows_of_any_length(lengths: tuple[int, ...]) -> None:
    """Fewer tokens than a padded row has, exactly as many, and one more."""
    model, batch = adapt(build("llama")), packed(*lengths, share=1.0)
    expected = gradients(token_nll, model, batch)
    assert_agree(gradients(FastNll(), model, batch), expected, loss=1e-5, slope=1e-4)


def test_nothing_supervised() -> None:
    model, batch = adapt(build("llama")), packed(9, 4, share=0.0)
    losses = FastNll()(model, batch)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert not any(p.grad.any() for p in lora_parameters(model).values() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_documents_never_feel_each_other(name: str, dtype: torch.dtype) -> None:
    model, nll = build(name, dtype=dtype), FastNll()
    documents = [document(length, seed, share=1.0) for seed, length in enumerate((17, 65, 9))]
    batch = pack(documents)
    with torch.no_grad():
        before = nll(model, batch)
        for changed, example in enumerate(documents):
            others = list(documents)
            others[changed] = document(len(example.ids), 77, share=1.0)
            elsewhere = batch.documents != changed
            after = nll(model, pack(others))
            assert torch.equal(after[elsewhere], before[elsewhere])
            assert not torch.equal(after, before)


@pytest.mark.parametrize("name", ["mistral", "qwen2 with a window", "qwen3 with a window"])
def test_the_window_matters(name: str) -> None:
    """Without it the losses differ, so that to agree is to have it."""
    model, batch = build(name), some_batch()
    windowed = FastNll()(model, batch)
    model.config.sliding_window = None
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    assert not torch.allclose(FastNll()(model, batch), windowed, rtol=1e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("recompute", [1, 2, 3, 99])
def test_computing_blocks_again_changes_no_bit(recompute: int, dropout: float) -> None:
    model, batch = adapt(build("qwen3"), dropout=dropout).train(), some_batch()
    results = []
    for loss in (FastNll(), FastNll(recompute=recompute)):
        torch.manual_seed(1)
        results.append(gradients(loss, model, batch))
    assert_same(*results)


def test_computing_blocks_again_keeps_less() -> None:
    model, batch = adapt(build("llama")), some_batch()

    def kept(loss: Loss) -> int:
        """Numbers that wait for the backward pass."""
        sizes: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks
        with hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            loss(model, batch)
        return sum(sizes)

    sizes = [kept(FastNll(recompute=blocks)) for blocks in (3, 2, 1, 0)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
def test_modes_differ_in_nothing_but_dropout(adapted: bool) -> None:
    model, batch = build("llama"), some_batch()
    model = adapt(model) if adapted else model
    expected = gradients(FastNll(), model.eval(), batch)
    assert_same(gradients(FastNll(), model.train(), batch), expected)
    with torch.no_grad():
        assert torch.equal(FastNll()(model, batch), expected[0])


def test_disabled_adapters() -> None:
    plain, batch = build("qwen2"), some_batch()
    base = FastNll()(plain, batch).detach()
    model = adapt(build("qwen2"), dropout=0.5).train()
    with torch.no_grad():
        assert not torch.allclose(FastNll()(model, batch), base, rtol=1e-2)
        with disabled(model):
            assert torch.equal(FastNll()(model, batch), base)
            assert_close(token_nll(model, batch), base, rtol=1e-5, atol=1e-5)


def test_some_adapters_disabled() -> None:
    model, batch = adapt(build("llama")), some_batch()
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "gate_proj", "down_proj")):
            module.enabled = False
    with torch.no_grad():
        assert_close(FastNll()(model, batch), token_nll(model, batch), rtol=1e-5, atol=1e-5)


SUBSETS: dict[str, dict[str, Any]] = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "k alone": {"target_modules": ["k_proj"]},
    "o and up": {"target_modules": ["o_proj", "up_proj"]},
    "down": {"target_modules": ["down_proj"]},
    "the second block": {"layers": [1]},
    "the last block": {"layers": [2], "target_modules": ["v_proj", "gate_proj"]},
    "ranks": {"rank_pattern": {"q_proj": 1, "gate_proj": 16}, "alpha_pattern": {"v_proj": 1.0}},
    "the head": {"target_modules": ["lm_head", "q_proj"]},
    "the embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "everything": {"target_modules": ".*(_proj|lm_head|embed_tokens)"},
    "nothing in a block": {"target_modules": ["lm_head", "embed_tokens"]},
    "pissa": {"init": "pissa", "dropout": 0.0},
    "dora": {"dora": True},
}


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("name", ["llama", "qwen2 with a window"])
def test_adapters_on_a_part(name: str, subset: str) -> None:
    model, batch = adapt(build(name), **SUBSETS[subset]), some_batch()
    expected = gradients(token_nll, model, batch)
    assert_agree(gradients(FastNll(), model, batch), expected, loss=1e-5, slope=1e-4)
    assert_same(gradients(FastNll(recompute=3), model, batch), gradients(FastNll(), model, batch))


@pytest.mark.parametrize("trained", ["norm.weight", "q_proj.weight", "layers.1.", "embed_tokens"])
def test_any_part_may_be_frozen(trained: str) -> None:
    model, batch = build("qwen3"), some_batch()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    expected, found = (gradients(loss, model, batch) for loss in (token_nll, FastNll()))
    assert_agree(found, expected, loss=1e-5, slope=1e-4)
    assert_same(gradients(FastNll(recompute=2), model, batch), found)


def dropped(model: nn.Module, batch: Batch, *, seed: int) -> tuple[Tensor, Gradients]:
    torch.manual_seed(seed)
    return gradients(FastNll(), model, batch)


@pytest.mark.usefixtures("_way")
def test_dropout_follows_the_seed() -> None:
    model, batch = adapt(build("llama"), dropout=0.2).train(), some_batch()
    first = dropped(model, batch, seed=1)
    next_step = gradients(FastNll(), model, batch)
    assert_same(dropped(model, batch, seed=1), first)
    for other in (next_step, dropped(model, batch, seed=2)):
        assert not torch.allclose(other[0], first[0], rtol=1e-3)


def test_dropout_rests_in_eval() -> None:
    batch = some_batch()
    expected = gradients(FastNll(), adapt(build("llama")), batch)
    model = adapt(build("llama"), dropout=0.2).train()
    assert not torch.equal(FastNll()(model, batch), expected[0])
    state = torch.get_rng_state()
    assert_same(gradients(FastNll(), model.eval(), batch), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_under_dropout_agree_with_finite_differences() -> None:
    """With the masks held fast, along a random direction of all factors."""
    model, batch = adapt(build("llama"), dropout=0.3).double().train(), some_batch()
    parameters = lora_parameters(model)
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}
    weights = torch.linspace(0.5, 1.5, batch.supervised_tokens, dtype=torch.float64)
    slope = dropped(model, batch, seed=1)[1]
    expected = sum((slope[name] * directions[name]).sum() for name in parameters)

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter += step * directions[name]
            torch.manual_seed(1)
            loss = (FastNll()(model, batch) * weights).sum()
            for name, parameter in parameters.items():
                parameter -= step * directions[name]
        return loss

    assert_close((moved(1e-6) - moved(-1e-6)) / 2e-6, expected, rtol=1e-6, atol=0)


def test_every_input_has_a_mask_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four in a block, and others at the next step."""
    keys: list[int] = []
    project, gated_mlp = kernels.project, kernels.gated_mlp

    def watched_project(x: Tensor, projections: Any, **options: Any) -> Any:
        keys.append(options["dropout"].key)
        return project(x, projections, **options)

    def watched_mlp(x: Tensor, *projections: Projection, **options: Any) -> Tensor:
        keys.extend(dropout.key for dropout in options["dropout"])
        return gated_mlp(x, *projections, **options)

    monkeypatch.setattr(kernels, "project", watched_project)
    monkeypatch.setattr(kernels, "gated_mlp", watched_mlp)
    model, batch = adapt(build("llama"), dropout=0.3).train(), some_batch()
    for _ in range(2):
        FastNll()(model, batch)
    assert len(keys) == len(set(keys)) == 2 * 3 * 4


def test_dora_at_its_start_is_lora() -> None:
    """While the magnitudes are the lengths of the rows nothing is scaled, under dropout either."""
    lora = adapt(build("llama"), dropout=0.3).train()
    dora = adapt(build("llama"), dropout=0.3, dora=True).train()
    own = lora_parameters(dora)
    with torch.no_grad():
        for name, parameter in lora_parameters(lora).items():
            own[name].copy_(parameter)
        for module in dora.modules():
            if isinstance(module, LoraLinear) and module.magnitude is not None:
                module.magnitude.copy_(module._norms())
    results = []
    for model in (lora, dora):
        torch.manual_seed(5)
        results.append(gradients(FastNll(), model, some_batch()))
    plain, scaled = results
    assert_close(scaled[0], plain[0], rtol=1e-5, atol=1e-5)
    assert_gradients({name: scaled[1][name] for name in plain[1]}, plain[1], 1e-4)
    assert all(gradient.any() for gradient in scaled[1].values())


def test_lengths_of_rows_are_those_of_the_weight_as_it_is() -> None:
    layer = adapt(build("llama"), dora=True).model.layers[0].self_attn.q_proj

    def assert_right() -> None:
        total = layer.weight.double() + layer.scale * layer.lora_B @ layer.lora_A
        assert_close(layer._norms().double(), total.norm(dim=1), rtol=1e-5, atol=1e-5)

    assert_right()
    with torch.no_grad():
        layer.base.weight.mul_(2)
    assert_right()
    layer.base.weight.data.mul_(2)  # which leaves no trace that could be looked for
    assert_right()
    layer.base.weight = nn.Parameter(layer.base.weight / 3)
    assert_right()
    layer.double()
    assert_right()


def test_dropouts_that_cannot_share_a_mask() -> None:
    model, batch = adapt(build("llama"), dropout=0.3).train(), some_batch()
    model.model.layers[1].self_attn.k_proj.dropout = 0.1
    with pytest.raises(ValueError, match="have different dropouts"):
        FastNll()(model, batch)
    assert FastNll()(model.eval(), batch).isfinite().all()


def test_a_module_that_it_does_not_know() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = build("llama")
    model.model.layers[1].mlp.up_proj = Doubled(48, 52, bias=False)
    with pytest.raises(TypeError, match="cannot run a Doubled; use --fast off"):
        FastNll()(model, some_batch())


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("name", MODELS)
def test_in_bf16_it_is_as_near_the_truth_as_the_model_itself(name: str) -> None:
    model, batch = adapt(build(name, dtype=torch.bfloat16)), some_batch()
    found, own = (gradients(loss, model, batch) for loss in (FastNll(), token_nll))
    exact = gradients(token_nll, model.double(), batch)
    assert found[0].dtype == torch.float32

    def error(result: tuple[Tensor, Gradients]) -> tuple[float, float]:
        """Of the losses in nats, the root mean square, and of all gradients, relative."""
        nats = (result[0].double() - exact[0]).square().mean().sqrt()
        flat, truth = (
            torch.cat([g.double().flatten() for g in r[1].values()]) for r in (result, exact)
        )
        return float(nats), float((flat - truth).norm() / truth.norm())

    for ours, theirs in zip(error(found), error(own), strict=True):
        assert ours < 1.5 * theirs + 1e-3
    assert all(g.dtype == torch.float32 for g in found[1].values())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_trained_model(shared: Callable[[str], Any], dtype: str) -> None:
    base = load_model(shared("models/stories260k"), dtype=dtype, device="cpu")
    assert isinstance(base.nll, FastNll)
    text = "Once upon a time there was a little girl named Lily. She loved to play outside."
    ids = tuple(base.tokenizer(text)["input_ids"])
    examples = [
        Example(ids[:n], (False,) * 3 + (True,) * (n - 3), 0, "test") for n in (9, len(ids), 21)
    ]
    model, batch = adapt(base.model, alpha=0.5), pack(examples)
    found, expected = (gradients(loss, model, batch) for loss in (base.nll, token_nll))
    if dtype == "fp32":
        assert_agree(found, expected, loss=1e-5, slope=1e-4)
    else:
        assert found[0].sum().item() == pytest.approx(expected[0].sum().item(), rel=0.01)
        assert_gradients(found[1], expected[1], 0.1)
