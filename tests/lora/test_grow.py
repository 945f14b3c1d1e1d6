"""Vocabularies that grow: rows, ids, sizes; and that nothing is left half-done."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
)

from lorikeet import starter
from lorikeet.config import LoraConfig
from lorikeet.data import Example, pack
from lorikeet.errors import AdapterError
from lorikeet.lora import (
    TokenEmbedding,
    TokenHead,
    Vocabulary,
    add_tokens,
    disabled,
    grow_vocabulary,
    growing,
    inject,
    lora_parameters,
    parameter_report,
    remove,
    tables,
    token_layers,
    unseen_tokens,
    vocabulary,
)
from lorikeet.model import FastNll, load_model, token_nll, tokenizer_fingerprint

Letters = Callable[[int], Any]
ROWS = 40
TEXTS = ["<ab>", "<abc/>"]
_SIZES: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "llama tied": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "gemma 3": lambda: Gemma3TextConfig(**_SIZES, head_dim=8),
    "a head with biases": lambda: PhiConfig(**_SIZES),
    "gpt2": lambda: GPT2Config(
        vocab_size=ROWS, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1
    ),
}


def build(name: str = "llama") -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(MODELS[name]()).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def logits(model: nn.Module, ids: list[int] = [3, 7, 1, 20, 5]) -> torch.Tensor:  # noqa: B006
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits


@pytest.mark.parametrize("padded", [0, 6])
@pytest.mark.parametrize("name", MODELS)
def test_rows_and_sizes(letters: Letters, name: str, padded: int) -> None:
    """New rows are the means of the pieces' rows, old ones and their logits what they were."""
    model, tokenizer = build(name), letters(ROWS - padded)
    before, first = logits(model), len(tokenizer)
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    grown = grow_vocabulary(model, tokenizer, TEXTS)
    assert grown == vocabulary(model)
    assert grown is not None
    assert (grown.texts, grown.ids) == (TEXTS, [first, first + 1])
    rows = max(ROWS, first + 2)
    assert (grown.rows, grown.base_rows) == (rows, ROWS)
    pieces = {34 if padded else 40: "<ab>", 35 if padded else 41: "<abc/>"}
    found = tables(model)
    assert [type(m) for m in found.all.values()] == [type(found.embedding), nn.Linear]
    for table, module in found.all.items():
        assert len(module.weight) == rows
        weight = old.get(f"{table}.weight", old[f"{found.name}.weight"])
        for token, text in pieces.items():
            ids = letters(34)(text)["input_ids"]
            assert_close(module.weight[token], weight[ids].mean(0))
        kept = [n for n in range(ROWS) if n not in pieces]
        assert torch.equal(module.weight[kept], weight[kept])
    head = model.get_output_embeddings()
    assert (head.weight is model.get_input_embeddings().weight) == tied
    assert (found.embedding.num_embeddings, head.out_features) == (rows, rows)
    assert model.config.vocab_size == rows
    if head.bias is not None:
        assert torch.equal(head.bias, torch.cat([old["lm_head.bias"], torch.zeros(rows - ROWS)]))
    after = logits(model)
    assert after.shape[-1] == rows
    kept = [n for n in range(ROWS) if n not in pieces]
    assert_close(after[..., kept], before[..., kept], atol=1e-6, rtol=1e-6)
    assert model(input_ids=torch.tensor([grown.ids]), labels=torch.tensor([grown.ids])).loss > 0


def test_a_tokenizer_that_has_learnt(letters: Letters) -> None:
    tokenizer = letters(ROWS)
    grow_vocabulary(build(), tokenizer, TEXTS)
    ids = tokenizer("x<ab>y<abc/><a", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "x <ab> y <abc/> < a"
    assert ids[1] == 40
    assert ids[3] == 41
    assert not tokenizer.added_tokens_decoder[40].special
    again = letters(ROWS)
    add_tokens(again, TEXTS)
    assert again.get_vocab() == tokenizer.get_vocab()
    add_tokens(again, None)


def test_growing_again_by_the_same_changes_nothing(letters: Letters) -> None:
    model, tokenizer = build(), letters(ROWS)
    grown = grow_vocabulary(model, tokenizer, TEXTS)
    weights = [p.data_ptr() for p in model.parameters()]
    assert grow_vocabulary(model, tokenizer, TEXTS) is grown
    assert grow_vocabulary(model, tokenizer, None) is grown
    assert [p.data_ptr() for p in model.parameters()] == weights
    with pytest.raises(
        AdapterError, match=r"was to grow by <x> \(42\), but has grown by <ab> \(40"
    ):
        grow_vocabulary(model, tokenizer, ["<x>"])
    with pytest.raises(AdapterError, match=r"'<ab>' is a token already, 40"):
        grow_vocabulary(model, tokenizer, ["<ab>", "<x>"])


def state(model: Any, tokenizer: Any) -> tuple[Any, ...]:
    sizes = [(n, getattr(m, "out_features", None)) for n, m in model.named_modules()]
    own = {n: (id(p), p.shape, p.requires_grad) for n, p in model.named_parameters()}
    return own, sizes, model.config.vocab_size, vocabulary(model), tokenizer_fingerprint(tokenizer)


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        (
            ["a", "<ab>"],
            "'a' is a token already, 2; to train its row, give lora.trainable_tokens 2",
        ),
        (["filler1"], "is a token already, 35"),
        (["<unk>"], "is a token already, 0"),
        (["\n"], "of '\\\\n' the tokenizer leaves nothing"),
    ],
)
def test_texts_that_cannot_become_tokens(letters: Letters, texts: list[str], named: str) -> None:
    model, tokenizer = build(), letters(ROWS)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    before = state(model, tokenizer)
    with pytest.raises(AdapterError, match=named):
        grow_vocabulary(model, tokenizer, texts)
    assert state(model, tokenizer) == before


def test_models_that_cannot_grow(letters: Letters) -> None:
    tokenizer = letters(ROWS + 34)
    model = build()
    before = state(model, tokenizer)
    with pytest.raises(AdapterError, match=r"of 40 rows, has none: filler6 \(40\), .* and 26 more"):
        grow_vocabulary(model, tokenizer, TEXTS)
    model.extra = nn.Embedding(ROWS, 4)
    with pytest.raises(AdapterError) as caught:
        grow_vocabulary(model, tokenizer, TEXTS)
    assert len(caught.value.problems) == 2
    assert (
        caught.value.problems[0]
        == "extra has a row for every token, too, of which nothing is known"
    )
    del model.extra
    assert state(model, tokenizer) == before
    adapted = build()
    inject(adapted, LoraConfig(target_modules=["q_proj"]), seed=0)
    with pytest.raises(AdapterError, match="already carries"):
        grow_vocabulary(adapted, letters(ROWS), TEXTS)


@pytest.mark.parametrize("name", ["llama", "llama tied", "a head with biases"])
def test_an_error_on_the_way_undoes_everything(letters: Letters, name: str) -> None:
    model, tokenizer = build(name), letters(ROWS)
    grown = grow_vocabulary(copy.deepcopy(model), copy.deepcopy(tokenizer), TEXTS)
    before, plain = state(model, tokenizer), logits(model)
    with pytest.raises(KeyError), growing(model, tokenizer, grown):
        assert model.config.vocab_size == 42
        raise KeyError
    assert state(model, tokenizer) == before
    assert torch.equal(logits(model), plain)
    assert grown is not None
    other = Vocabulary(grown.tokens[1:], 42, ROWS)
    with (
        pytest.raises(AdapterError, match="would be token 40 here, not 41"),
        growing(model, tokenizer, other),
    ):
        pass
    assert state(model, tokenizer) == before


@pytest.mark.parametrize("name", MODELS)
def test_new_rows_are_trained(letters: Letters, name: str) -> None:
    """Beside the whole grown weights trained; a head of its own has rows of its own."""
    model, tokenizer = build(name), letters(ROWS)
    config = LoraConfig(
        r=2,
        target_modules=["c_attn" if name == "gpt2" else "q_proj"],
        new_tokens=TEXTS,
        trainable_tokens=[7],
    )
    with pytest.raises(AdapterError, match="gained is nothing; give the same to grow_vocabulary"):
        inject(model, config, seed=0)
    grow_vocabulary(model, tokenizer, TEXTS)
    oracle = copy.deepcopy(model).double()
    plain = logits(model)
    inject(model, config, seed=0)
    layers, places = token_layers(model), tables(oracle)
    assert layers[places.name].tokens.tolist() == [7, 40, 41]
    for head in places.heads:
        assert isinstance(layers[head], TokenHead)
        assert layers[head].tokens.tolist() == [40, 41]
        assert layers[head].rows is not None
    assert set(lora_parameters(model)) >= {f"{n}.rows" for n in (places.name, *places.heads)}
    assert_close(logits(model), plain, atol=1e-5, rtol=1e-5)
    for number, layer in enumerate(layers.values()):
        if layer.rows is not None:
            nn.init.normal_(layer.rows, generator=torch.Generator().manual_seed(number))
            table = (
                places.embedding if isinstance(layer, TokenEmbedding) else places.heads["lm_head"]
            )
            table.weight.data[layer.tokens] = layer.rows.detach().double()
    model.double()
    ids = torch.tensor([[3, 40, 7, 41, 5, 40]])
    for one in (oracle, model):
        one(input_ids=ids, labels=ids).loss.backward()
    for name, layer in layers.items():
        if layer.rows is not None:
            weight = oracle.get_submodule(name).weight
            assert_close(layer.rows.grad, weight.grad[layer.tokens], atol=1e-12, rtol=1e-12)
    with disabled(model):
        assert_close(logits(model).float(), plain, atol=1e-5, rtol=1e-5)
    report = parameter_report(model)
    counted = {f"{n.rpartition('.')[2]}, single tokens" for n in (places.name, *places.heads)}
    assert counted <= set(report.by_target)
    assert report.trainable == sum(report.by_target.values())
    remove(model)
    assert_close(logits(model).float(), plain, atol=1e-5, rtol=1e-5)
    with pytest.raises(AdapterError, match=r"lora.new_tokens is empty, .* <ab>, <abc/>; give"):
        inject(model, LoraConfig(), seed=0)


@pytest.mark.parametrize(
    ("name", "saved", "rows"),
    [
        ("llama", ["embed_tokens"], ["lm_head"]),
        ("llama", ["lm_head"], ["model.embed_tokens"]),
        ("llama", ["embed_tokens", "lm_head"], []),
        ("llama tied", ["embed_tokens", "lm_head"], []),
    ],
)
def test_what_is_trained_whole_needs_no_rows(
    letters: Letters, name: str, saved: list[str], rows: list[str]
) -> None:
    model = build(name)
    grow_vocabulary(model, letters(ROWS), TEXTS)
    config = LoraConfig(r=2, target_modules=["q_proj"], new_tokens=TEXTS, modules_to_save=saved)
    inject(model, config, seed=0)
    assert list(token_layers(model)) == rows


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}]
)
def test_a_tied_head_alone_is_not_trained_beside_new_tokens(
    letters: Letters, options: dict[str, Any]
) -> None:
    model = build("llama tied")
    grow_vocabulary(model, letters(ROWS), TEXTS)
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "new_tokens": TEXTS, **options})
    with pytest.raises(
        AdapterError, match=r"lm_head is .* shares the weight of model.embed_tokens"
    ):
        inject(model, config, seed=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_fast_path_on_a_grown_model(dtype: str, tied: bool) -> None:
    """An odd number of rows, tokens that are read and predicted; losses and gradients."""
    base = load_model(starter.folder(), dtype=dtype)
    if not tied:
        base.model.lm_head.weight = nn.Parameter(base.model.lm_head.weight.detach().clone() * 1.1)
    assert isinstance(base.nll, FastNll)
    before = base.identity
    grown = grow_vocabulary(base.model, base.tokenizer, ["<tool>", "</tool>", " plum "])
    assert base.identity == before
    assert grown is not None
    assert grown.rows == 1027
    examples = []
    for text in ("Say <tool>plum</tool> plum </tool>!", "<tool>", "Arr, <tool> plum  plum "):
        ids = base.tokenizer(text)["input_ids"]
        examples.append(Example(tuple(ids), (False,) + (True,) * (len(ids) - 1), 0, "test"))
    batch = pack([example for example in examples if len(example.ids) > 1])
    assert set(grown.ids) <= set(batch.ids.tolist())
    tolerance = 1e-4 if dtype == "fp32" else 5e-2

    def compare() -> torch.Tensor:
        trained = [p for p in base.model.parameters() if p.requires_grad]
        found, expected = (nll(base.model, batch) for nll in (base.nll, token_nll))
        assert_close(found, expected, atol=tolerance, rtol=tolerance)
        ours, own = (torch.autograd.grad(loss.sum(), trained) for loss in (found, expected))
        one, other = (torch.cat([g.double().flatten() for g in side]) for side in (ours, own))
        assert float((one - other).norm() / other.norm()) < 4 * tolerance
        return found.detach()

    plain = compare()  # every weight, the grown ones among them
    inject(base.model, LoraConfig(r=2, new_tokens=grown.texts), seed=0)
    for name, parameter in lora_parameters(base.model).items():
        if name.endswith(("lora_B", "rows")):
            nn.init.normal_(parameter, std=0.05)
    assert not torch.allclose(compare(), plain, atol=0.1)
    with disabled(base.model):
        assert_close(base.nll(base.model, batch).detach(), plain, atol=tolerance, rtol=tolerance)


def test_structure_without_weights(letters: Letters) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MODELS["llama"]())
    grown = grow_vocabulary(model, letters(ROWS), TEXTS)
    inject(model, LoraConfig(r=2, new_tokens=TEXTS), seed=0)
    assert grown is not None
    assert model.lm_head.rows.shape == (2, 16)
    assert parameter_report(model).by_target["lm_head, single tokens"] == 32
    ids = torch.zeros(1, 3, dtype=torch.int64, device="meta")
    assert model(input_ids=ids).logits.shape == (1, 3, 42)


def test_tokens_that_no_example_has(letters: Letters) -> None:
    model, tokenizer = build(), letters(ROWS)
    assert unseen_tokens(model, [[1]]) == []
    grow_vocabulary(model, tokenizer, TEXTS)
    (found,) = unseen_tokens(model, [[1, 40], [2]])
    assert "has the new tokens <abc/> (41);" in found
    assert unseen_tokens(model, [[40], [41]]) == []
