"""Calibration: mean squares by hand, the same with and without an adapter around a layer."""

from __future__ import annotations

import pytest
import torch

from lorikeet import starter
from lorikeet.config import LoraConfig
from lorikeet.data import Example
from lorikeet.errors import DataError
from lorikeet.export.importance import Importance, measure_importance
from lorikeet.lora import inject
from lorikeet.model import load_model


def documents(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in lengths:
        ids = torch.randint(3, 1000, (length,), generator=generator).tolist()
        made.append(Example(tuple(ids), tuple(i > 0 for i in range(length)), length, "x"))
    return made


@pytest.fixture(scope="module")
def found() -> Importance:
    base = load_model(starter.folder(), dtype="fp32", fast="off")
    return measure_importance(base.model, documents(7, 30), source="words.txt")


def test_every_linear_layer_but_the_head_has_one(found: Importance) -> None:
    assert len(found.means) == 4 * 7
    assert found.of("lm_head.weight") is None
    assert found.of("model.embed_tokens.weight") is None
    widths = {"self_attn.q_proj": 256, "self_attn.o_proj": 256, "mlp.down_proj": 512}
    for name, width in widths.items():
        own = found.of(f"model.layers.3.{name}.weight")
        assert own is not None
        assert own.shape == (width,)
        assert own.dtype == torch.float32
        assert bool((own > 0).all())
    assert (found.documents, found.tokens) == (2, 37)


def test_the_first_layer_by_hand(found: Importance) -> None:
    """What goes into the first q_proj is the embedding, normed; of all tokens, documents pooled."""
    base = load_model(starter.folder(), dtype="fp32", fast="off")
    ids = torch.tensor([i for d in documents(7, 30) for i in d.ids])
    inner = base.model.model
    with torch.no_grad():
        entering = inner.layers[0].input_layernorm(inner.embed_tokens(ids))
    own = found.of("model.layers.0.self_attn.q_proj.weight")
    torch.testing.assert_close(own, entering.double().square().mean(0).float())


def test_an_adapter_changes_what_comes_after_it_and_no_name(found: Importance) -> None:
    base = load_model(starter.folder(), dtype="fp32", fast="off")
    inject(base.model, LoraConfig(r=4, alpha=8.0), seed=0)
    same = measure_importance(base.model, documents(7, 30), source="words.txt")
    assert {n: w.tolist() for n, w in same.means.items()} == {
        n: w.tolist() for n, w in found.means.items()
    }
    for name, parameter in base.model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.constant_(parameter, 0.05)
    moved = measure_importance(base.model, documents(7, 30), source="words.txt")
    first, last = "model.layers.0.self_attn.q_proj.weight", "model.layers.3.mlp.down_proj.weight"
    assert torch.equal(moved.means[first], found.means[first])
    assert not torch.allclose(moved.means[last], found.means[last])


def test_no_hook_stays_behind() -> None:
    base = load_model(starter.folder(), dtype="fp32", fast="off")
    seen: list[tuple[int, int]] = []
    measure_importance(
        base.model, documents(5, 6), source="x", progress=lambda *at: seen.append(at)
    )
    assert seen == [(1, 2), (2, 2)]
    assert not any(module._forward_pre_hooks for module in base.model.modules())


def test_the_file_says_what_it_was_calibrated_on(found: Importance) -> None:
    said = {name: field.value for name, field in found.metadata().items()}
    assert said == {
        "quantize.imatrix.file": "words.txt",
        "quantize.imatrix.dataset": "words.txt",
        "quantize.imatrix.entries_count": 28,
        "quantize.imatrix.chunks_count": 2,
    }


def test_nothing_to_calibrate_on() -> None:
    base = load_model(starter.folder(), dtype="fp32", fast="off")
    with pytest.raises(DataError, match="no documents"):
        measure_importance(base.model, [], source="x")
