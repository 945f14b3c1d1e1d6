from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from lorikeet.config import LoraConfig
from lorikeet.errors import AdapterError
from lorikeet.lora import find_targets, inject, out_of_reach
from lorikeet.lora.targets import layer_kind

Build = Callable[..., LlamaForCausalLM]
BLOCK = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]


def names(model: nn.Module, **options: object) -> list[str]:
    return [target.name for target in find_targets(model, LoraConfig.model_validate(options))]


def problems(model: nn.Module, **options: object) -> str:
    with pytest.raises(AdapterError) as caught:
        find_targets(model, LoraConfig.model_validate(options))
    return str(caught.value)


@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_spares_the_head(llama: Build, tied: bool) -> None:
    expected = [f"model.layers.{i}.{name}" for i in range(2) for name in BLOCK]
    assert names(llama(tied=tied)) == expected


def test_all_linear_of_a_plain_module_is_every_linear() -> None:
    assert names(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == ["0", "2"]


def test_names_match_whole_parts_only(llama: Build) -> None:
    assert names(llama(), target_modules=["q_proj"]) == [
        f"model.layers.{i}.self_attn.q_proj" for i in range(2)
    ]
    assert names(llama(), target_modules=["layers.1.self_attn.q_proj", "lm_head"]) == [
        "model.layers.1.self_attn.q_proj",
        "lm_head",
    ]
    assert "matches no module" in problems(llama(), target_modules=["proj"])


def test_a_regular_expression_matches_the_full_name(llama: Build) -> None:
    found = names(llama(), target_modules=r".*\.1\..*(q|v)_proj")
    assert found == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    assert "selects no module" in problems(llama(), target_modules=r"(q|v)_proj")


def test_exclude_modules(llama: Build) -> None:
    found = names(llama(layers=1), target_modules="all-linear", exclude_modules=["mlp.up_proj"])
    assert found == [f"model.layers.0.{name}" for name in BLOCK if name != "mlp.up_proj"]
    found = names(llama(layers=1), exclude_modules=r".*self_attn.*")
    assert found == [f"model.layers.0.{name}" for name in BLOCK[4:]]


def test_layers_keep_numbered_blocks(llama: Build) -> None:
    model = llama(layers=4)
    found = names(model, target_modules=["q_proj"], layers="1-2")
    assert found == [f"model.layers.{i}.self_attn.q_proj" for i in (1, 2)]
    assert len(names(model, layers=[3])) == len(BLOCK)
    exact = ["model.layers.0.self_attn.q_proj", "v_proj"]
    assert names(model, target_modules=exact, layers=[3]) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.3.self_attn.v_proj",
    ]


def test_an_expert_is_in_the_block_of_its_layer() -> None:
    experts = (nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])}) for _ in range(2))
    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(experts)})})
    assert names(model, layers=[1]) == ["model.layers.1.experts.0"]


def test_rank_and_alpha_patterns(llama: Build) -> None:
    config = LoraConfig(
        r=4,
        alpha=8,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={r"layers\.1\..*q_proj": 2, "q_proj": 3},
        alpha_pattern={"v_proj": 2.0},
    )
    found = {(t.name.split(".")[2], t.leaf): t for t in find_targets(llama(), config)}
    assert {key: (t.r, t.alpha) for key, t in found.items()} == {
        ("0", "q_proj"): (3, 8),
        ("1", "q_proj"): (2, 8),
        ("0", "v_proj"): (4, 2),
        ("1", "v_proj"): (4, 2),
    }
    assert found["1", "q_proj"].scale == 4.0
    rslora = find_targets(llama(), config.model_copy(update={"rslora": True}))
    assert rslora[1].scale == 2 / 4**0.5


def test_tied_weights_are_adapted_where_named(llama: Build) -> None:
    model = llama(tied=True)
    assert names(model, target_modules=["lm_head"]) == ["lm_head"]
    targets = find_targets(model, LoraConfig(target_modules=["embed_tokens"]))
    assert [(t.name, t.kind) for t in targets] == [("model.embed_tokens", "embedding")]


def test_every_finding_is_listed(llama: Build) -> None:
    message = problems(
        llama(),
        target_modules=["q_prj", "k_proj", "norm"],
        exclude_modules=["lmhead", "self_attn"],
        layers=[1, 7, 9],
        rank_pattern={"up_proj": 4, "k_proj": 0},
        alpha_pattern={"k_prj": 4},
    )
    for part in (
        "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head (linear)",
        "embed_tokens (embedding)",
        "'q_prj' matches no module; did you mean q_proj",
        "exclude_modules: 'lmhead' matches no linear layer and no embedding; did you mean lm_head?",
        "exclude_modules: 'self_attn' matches no linear",
        "layers: no target in block 7, 9",
        "rank_pattern: 'up_proj' matches none of the targets",
        "rank_pattern: k_proj = 0",
        "alpha_pattern: 'k_prj' matches none of the targets; did you mean k_proj?",
    ):
        assert part in message


def test_a_target_that_is_wholly_left_out_is_a_finding(llama: Build) -> None:
    message = problems(llama(), target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"])
    assert "'v_proj' matches only modules that exclude_modules or layers leave out" in message
    message = problems(llama(), target_modules=["q_proj", "embed_tokens"], layers=[0])
    assert "'embed_tokens' matches only modules" in message


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_broken_regular_expression_is_a_finding(llama: Build, field: str) -> None:
    assert f"{field}: '.*(q' is not a regular" in problems(llama(), **{field: ".*(q"})
    assert "not a regular" in problems(llama(), **{field: ".*(q"}, rank_pattern={"(": 2})


def test_other_classes_are_refused_by_name(llama: Build) -> None:
    message = problems(llama(), target_modules=["input_layernorm"])
    assert "model.layers.0.input_layernorm (and 1 more) is of class LlamaRMSNorm" in message


def test_gpt2s_transposed_layers_are_linear_layers() -> None:
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1))
    block = "transformer.h.0."
    linear = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert names(gpt2) == [block + name for name in linear]
    assert names(gpt2, target_modules=["c_attn", "wte"]) == ["transformer.wte", block + linear[0]]


def test_a_subclass_with_its_own_forward_is_refused() -> None:
    class Shifted(nn.Embedding):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + 2)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = Shifted(4, 2)

    assert "positions is of class Shifted" in problems(Model(), target_modules=["positions"])


class Product(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(2 * x)


class Noisy(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + torch.randn_like(x) if self.training else x)


class Rounding(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.round(decimals=2), self.bias)


class Routing(nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(x), x


class Scaled(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("factor", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.factor


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_subclass_that_computes_the_same_is_a_linear_layer(bias: bool, device: str) -> None:
    layer = Product(4, 6, bias=bias, device=device)
    weight, state = layer.weight, torch.get_rng_state()
    assert layer_kind(layer) == "linear"
    assert layer.weight is weight and layer.in_features == 4 and layer.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("cls", [Doubled, Noisy, Rounding, Routing, Scaled])
def test_a_subclass_that_computes_something_else_is_not(cls: type[nn.Linear]) -> None:
    assert layer_kind(cls(4, 6).eval()) is None


def test_a_router_can_be_left_out_of_all_linear() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.up = Routing(4, 2), nn.Linear(4, 4)

    assert "--lora.exclude_modules router leaves it out" in problems(Model())
    assert "exclude_modules" not in problems(Model(), target_modules=["router"])
    assert names(Model(), exclude_modules=["router"]) == ["up"]


def test_an_adapted_model_shows_its_bases(llama: Build) -> None:
    model = llama()
    config = LoraConfig(target_modules=["q_proj", "lm_head", "embed_tokens"])
    before = find_targets(model, config)
    everything = names(model)
    inject(model, config, seed=0)
    assert find_targets(model, config) == before
    assert names(model) == everything


def test_stacked_experts_are_told() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=2))
    (warning,) = out_of_reach(model, LoraConfig())
    assert warning.startswith("all-linear leaves out experts (")
    assert out_of_reach(model, LoraConfig(target_modules=["q_proj"])) == []
