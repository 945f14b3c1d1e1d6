"""Figures of updates, against the updates themselves and against spectra made to order."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
import torch
from torch.testing import assert_close

from lorikeet.adapters import Adapter, Tokens, Update
from lorikeet.adapters.anatomy import effective_rank, examine
from lorikeet.errors import AdapterError

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def with_values(values: Sequence[float], *, out: int = 9, into: int = 7, seed: int = 0) -> Update:
    """An update whose singular values are these; scale 0.5."""
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(rows: int) -> torch.Tensor:
        made = torch.randn(rows, len(values), generator=generator, dtype=torch.float64)
        return torch.linalg.qr(made)[0]

    left, right = orthonormal(out), orthonormal(into)
    scaled = left * torch.tensor(values, dtype=torch.float64) / 0.5
    return Update(right.t().float(), scaled.float(), 0.5)


def untrained(*, out: int = 9, into: int = 7, r: int = 3) -> Update:
    return Update(torch.randn(r, into), torch.zeros(out, r), 0.5)


def test_figures_of_a_spectrum_made_to_order() -> None:
    (found,) = examine(Adapter({Q: with_values([4.0, 2.0, 1.0, 1.0])})).modules
    assert found.norm == pytest.approx(math.sqrt(22))
    assert found.spectral_norm == pytest.approx(4)
    assert found.first_half == pytest.approx(20 / 22)
    # Shares 1/2, 1/4, 1/8, 1/8: an entropy of 1.75 bits.
    assert found.effective_rank == pytest.approx(2**1.75)
    assert (found.r, found.scale, found.shape, found.parameters) == (4, 0.5, (9, 7), 4 * 16)
    assert found.layer == 0


def test_the_middle_of_an_odd_rank_counts_to_the_first_half() -> None:
    (found,) = examine(Adapter({Q: with_values([2.0, 1.0, 1.0])})).modules
    assert found.first_half == pytest.approx(5 / 6)
    (one,) = examine(Adapter({Q: with_values([2.0])})).modules
    assert one.first_half == pytest.approx(1)
    assert one.effective_rank == pytest.approx(1)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_norms_are_those_of_the_whole_update(kind: str) -> None:
    update = Update(torch.randn(5, 8), torch.randn(12, 5), 1.5, kind)  # type: ignore[arg-type]
    weight = torch.randn(update.shape)
    (found,) = examine(Adapter({Q: update}), lambda name: weight).modules
    change = update.applied(weight) - weight
    assert found.norm == pytest.approx(change.norm().item(), rel=1e-5)
    expected = torch.linalg.matrix_norm(change, 2).item()
    assert found.spectral_norm == pytest.approx(expected, rel=1e-5)
    assert found.summary()["relative"] == pytest.approx(
        (change.norm() / weight.norm()).item(), rel=1e-5
    )
    assert found.summary()["rms"] == pytest.approx(change.square().mean().sqrt().item(), rel=1e-5)
    assert found.a_norm == pytest.approx(update.A.norm().item())
    assert found.b_norm == pytest.approx(update.B.norm().item())


def test_a_rank_above_the_weights_smaller_side() -> None:
    update = Update(torch.randn(6, 4), torch.randn(3, 6), 1.0)
    (found,) = examine(Adapter({Q: update})).modules
    assert found.norm == pytest.approx(update.delta().norm().item(), rel=1e-5)
    assert found.effective_rank <= 3


def test_effective_rank_at_its_ends() -> None:
    assert effective_rank([3.0, 3.0, 3.0]) == pytest.approx(3)
    assert effective_rank([3.0, 0.0, 0.0]) == pytest.approx(1)
    assert effective_rank([0.0, 0.0]) == 0


def test_what_moved_most_depends_on_the_weights() -> None:
    adapter = Adapter({Q: with_values([2.0, 1.0]), V: with_values([1.0, 1.0])})
    weights = {Q: torch.full((9, 7), 1.0), V: torch.full((9, 7), 0.1)}
    assert [m.name for m in examine(adapter).most_moved()] == [Q, V]
    weighed = examine(adapter, weights.__getitem__)
    assert [m.name for m in weighed.most_moved()] == [V, Q]
    assert weighed.summary()["moved_by"] == "relative"
    assert weighed.total.norm == pytest.approx(math.sqrt(7))
    assert weighed.total.relative == pytest.approx(math.sqrt(7 / (63 * 1.01)), rel=1e-5)


def test_base_weights_of_another_shape_are_all_named() -> None:
    adapter = Adapter({Q: with_values([2.0]), V: with_values([1.0])})
    with pytest.raises(AdapterError) as error:
        examine(adapter, lambda name: torch.zeros(7, 9))
    assert len(error.value.problems) == 2
    assert "[7, 9], but the adapter fits [9, 7]" in error.value.problems[0]

    def nothing(name: str) -> torch.Tensor:
        raise AdapterError(f"no tensor {name}")

    many = Adapter({f"model.layers.{i}.q_proj": with_values([2.0]) for i in range(20)})
    with pytest.raises(AdapterError) as error:
        examine(many, nothing)
    assert len(error.value.problems) == 9
    assert error.value.problems[-1] == "and 12 more"


def test_no_update_at_all() -> None:
    with pytest.raises(AdapterError, match="updates no module"):
        examine(Adapter({}))


def test_an_untrained_module_is_a_finding() -> None:
    anatomy = examine(Adapter({Q: untrained(), V: with_values([1.0, 0.9, 0.8])}))
    (finding,) = anatomy.findings
    assert finding.startswith("B is all zero")
    assert Q in finding
    assert V not in finding
    found = next(m for m in anatomy.modules if m.name == Q)
    assert (found.norm, found.effective_rank, found.first_half) == (0, 0, None)


def test_factors_that_cancel_are_told_from_untrained_ones() -> None:
    update = Update(torch.zeros(2, 7), torch.randn(9, 2), 1.0)
    (finding,) = examine(Adapter({Q: update})).findings
    assert finding.startswith("B A is zero")


def test_an_effective_rank_far_below_r_is_a_finding() -> None:
    low = with_values([1.0, *[1e-6] * 5])
    full = with_values([1.0] * 6)
    (finding,) = examine(Adapter({Q: low, V: full})).findings
    assert "below 25% of r" in finding
    assert f"{Q} (1.0 of 6)" in finding
    assert V not in finding


def test_ranks_and_scales_that_differ_are_findings() -> None:
    one = with_values([1.0, 1.0])
    adapter = Adapter({Q: one, V: Update(one.A[:1], one.B[:, :1], 2.0)})
    ranks, scales = examine(adapter).findings
    assert ranks.startswith("ranks differ (1 in 1 modules, 2 in 1 modules)")
    assert scales.startswith("scales differ (0.5 in 1 modules, 2 in 1 modules)")
    assert examine(adapter).ranks == {1: 1, 2: 1}


def test_dora_is_said_and_its_range_given() -> None:
    plain = with_values([1.0, 1.0])
    update = Update(plain.A, plain.B, plain.scale, magnitude=torch.linspace(0.5, 2.5, 9))
    anatomy = examine(Adapter({Q: update}))
    (found,) = anatomy.modules
    assert found.magnitude == (0.5, 2.5)
    assert found.parameters == 2 * 16 + 9
    assert found.norm == pytest.approx(math.sqrt(2))
    assert any("DoRA in 1 modules" in finding for finding in anatomy.findings)


def test_kinds_and_layers() -> None:
    names = [
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.c_proj",
        "transformer.h.10.mlp.experts.0.w1",
        "transformer.h.10.mlp.experts.1.w1",
        "transformer.h.2.attn.c_attn",
        "lm_head",
    ]
    updates = {name: with_values([float(i + 1)]) for i, name in enumerate(names)}
    anatomy = examine(Adapter(updates))
    assert anatomy.layers == [0, 2, 10, None]
    assert set(anatomy.by_kind()) == {"c_attn", "attn.c_proj", "mlp.c_proj", "w1", "lm_head"}
    experts = anatomy.cells()[10, "w1"]
    assert (experts.modules, experts.norm) == (2, pytest.approx(math.hypot(4, 5)))
    assert anatomy.by_kind()["c_attn"].norm == pytest.approx(math.hypot(1, 6))
    assert anatomy.by_layer()[None].norm == pytest.approx(7)
    together = torch.tensor([group.norm for group in anatomy.by_layer().values()])
    assert_close(together.norm().item(), anatomy.total.norm, rtol=1e-6, atol=0)


def test_the_summary_is_json() -> None:
    anatomy = examine(Adapter({Q: with_values([1.0, 0.5]), "lm_head": untrained()}))
    found = json.loads(json.dumps(anatomy.summary(), allow_nan=False))
    assert found["parameters"] == sum(m["parameters"] for m in found["modules"]) == 2 * 16 + 3 * 16
    assert found["bytes"] == 4 * found["parameters"]
    assert [m["name"] for m in found["modules"]] == [Q, "lm_head"]
    assert set(found["by_layer"]) == {"0", "other"}


def test_what_is_no_update_is_said() -> None:
    update = Update(torch.ones(1, 2), torch.ones(3, 1), 1.0)
    adapter = Adapter(
        {"x": update},
        whole={"lm_head.weight": torch.ones(2, 2)},
        tokens=(Tokens("embed", (1, 2), torch.ones(2, 4)),),
    )
    found = " ".join(examine(adapter).findings)
    assert "trained whole, in no figure above (1): lm_head.weight" in found
    assert "the rows of 2 tokens were trained" in found
