"""Verification: figures by hand, the evaluation's own, and differences that are found."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lorikeet.adapters import Update
from lorikeet.data import Example
from lorikeet.errors import DataError, ModelError
from lorikeet.evaluate import evaluate, paired_difference
from lorikeet.export import Tolerance, Way, run_by, tolerance_of, verify


def example(*ids: int, skip: int = 1) -> Example:
    return Example(ids, tuple(i >= skip for i in range(len(ids))), len(ids), "x")


def fixed(name: str, rows: Sequence[Sequence[float]], outputs: Sequence[list[int]] = ()) -> Way:
    """Gives the same probabilities whatever it is shown, row s for supervised token s."""
    table = torch.tensor(rows).log()

    def logits(shown: Example) -> torch.Tensor:
        return table[: shown.supervised_tokens] + 3.0  # a constant changes no distribution

    return Way(name, logits, lambda prompts: [list(out) for out in outputs[: len(prompts)]])


P = [[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]
Q = [[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]


def test_figures_by_hand() -> None:
    found = verify(fixed("p", P), fixed("q", Q), [example(2, 0, 2), example(2, 1)])
    # KL of the first row: 0.5 ln 2 + 0.25 ln 0.5 = 0.25 ln 2; of the second 0.
    kl = 0.25 * math.log(2)
    assert found.kl_mean == pytest.approx(2 * kl / 3, rel=1e-6)
    assert found.kl_p99 == pytest.approx(kl, rel=1e-6)
    assert found.reference.nll == pytest.approx((-math.log(0.5 * 0.8) - math.log(0.25)) / 3)
    assert found.candidate.nll == pytest.approx((-math.log(0.25 * 0.8) - math.log(0.5)) / 3)
    assert found.difference.nll == pytest.approx(0, abs=1e-7)
    assert found.difference.stderr is not None
    assert found.difference.stderr > 0.2  # one document better, one worse
    assert found.reference.tokens == 3
    assert found.reference.perplexity == pytest.approx(math.exp(found.reference.nll))


def test_the_divergence_is_that_of_the_candidate_from_the_reference() -> None:
    p, q = [[0.98, 0.01, 0.01]], [[0.01, 0.98, 0.01]]
    skewed = [[0.5, 0.49, 0.01]]
    there = verify(fixed("p", p), fixed("q", skewed), [example(0, 0)]).kl_mean
    back = verify(fixed("p", skewed), fixed("q", p), [example(0, 0)]).kl_mean
    assert there == pytest.approx(0.98 * math.log(0.98 / 0.5) + 0.01 * math.log(0.01 / 0.49))
    assert back == pytest.approx(0.5 * math.log(0.5 / 0.98) + 0.49 * math.log(49))
    assert verify(fixed("p", p), fixed("q", q), [example(0, 0)]).kl_mean > 4


def test_tokens_that_the_reference_rules_out() -> None:
    found = verify(fixed("p", [[1.0, 0.0]]), fixed("q", [[0.5, 0.5]]), [example(0, 0)])
    assert found.kl_mean == pytest.approx(math.log(2))


def test_agreement_by_hand() -> None:
    expected = [[1, 2, 3, 4], [5, 6], [7], []]
    found = [[1, 2, 9, 4], [5, 6], [7, 8], []]
    done = verify(
        fixed("p", P, expected), fixed("q", P, found), [example(0, 1)], [[1], [2], [3], [4]]
    )
    assert done.prompts == 4
    assert done.identical == 0.5
    assert done.agreeing == (2 + 2 + 1) / (4 + 2 + 2)
    alone = verify(fixed("p", P), fixed("q", P), [example(0, 1)])
    assert (alone.prompts, alone.identical, alone.agreeing) == (0, 1.0, 1.0)


def test_problems_name_figure_and_limit() -> None:
    found = verify(fixed("p", P), fixed("q", Q), [example(2, 0, 2)])
    strict = found.problems(Tolerance(kl=0.01, nll=0.01))
    assert strict == [
        "the mean KL is 8.66e-02 nats/token, at most 1e-02 is allowed",
        "the difference in nll is 3.47e-01 nats/token, at most 1e-02 is allowed",
    ]
    assert found.problems(Tolerance(kl=1, nll=1)) == []
    assert len(found.problems(Tolerance(kl=1, nll=0.01))) == 1
    better = verify(fixed("q", Q), fixed("p", P), [example(2, 0, 2)])
    assert better.difference.nll < 0
    assert len(better.problems(Tolerance(kl=1, nll=0.01))) == 1  # better is different, too


def test_a_difference_that_may_be_chance_is_no_problem() -> None:
    """One document gains what another loses, or nearly; KL has no such excuse."""
    few = [example(2, 0, 2), example(2, 1)]
    found = verify(fixed("p", P), fixed("q", Q), [*few, example(2, 0)])
    assert found.difference.nll > 0.1
    assert found.problems(Tolerance(kl=1, nll=1e-9)) == []
    assert len(found.problems(Tolerance(kl=1e-9, nll=1e-9))) == 1
    always = [example(2, 0, 2), example(2, 0)] * 20
    sure = verify(fixed("p", P), fixed("q", Q), always)
    assert sure.difference.interval is not None
    nearer = sure.difference.interval[0]
    assert 0 < nearer < sure.difference.nll
    assert len(sure.problems(Tolerance(kl=1, nll=nearer * 0.99))) == 1
    assert sure.problems(Tolerance(kl=1, nll=nearer * 1.01)) == []


def test_what_is_not_a_number_is_a_problem() -> None:
    found = verify(fixed("p", P), fixed("q", [[math.nan] * 3] * 2), [example(2, 0, 2)])
    assert len(found.problems(tolerance_of(["F32"], arithmetic="bf16"))) == 2


def test_nothing_to_verify_on() -> None:
    with pytest.raises(DataError, match="nothing to verify on"):
        verify(fixed("p", P), fixed("q", Q), [example(1, 2, skip=5)])


def test_another_vocabulary() -> None:
    with pytest.raises(ModelError, match=r"q gives logits \[1, 2\] where p gives \[1, 3\]"):
        verify(fixed("p", P), fixed("q", [[0.5, 0.5]]), [example(0, 1)])


def model() -> PreTrainedModel:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config).eval()


DOCUMENTS = [example(*(torch.arange(n) * 7 % 40).tolist(), skip=1 + n % 3) for n in (2, 5, 9, 200)]


def way(name: str, net: PreTrainedModel, stop: set[int] | None = None) -> Way:
    return run_by(name, net, stop_ids=stop or set(), max_new_tokens=6)


def test_the_same_model_is_the_same() -> None:
    found = verify(way("a", model()), way("b", model()), DOCUMENTS, [[1, 2], [3]])
    assert (found.kl_mean, found.kl_p99, found.difference.nll) == (0, 0, 0)
    assert (found.identical, found.agreeing, found.prompts) == (1, 1, 2)
    assert found.problems(tolerance_of(["F32"], arithmetic="fp32")) == []


def test_scores_are_those_of_the_evaluation() -> None:
    other = model()
    torch.nn.init.normal_(other.lm_head.weight, std=0.3)
    found = verify(way("a", model()), way("b", other), DOCUMENTS)
    expected, theirs = (evaluate(net, DOCUMENTS, packing=False) for net in (model(), other))
    np.testing.assert_allclose(found.reference.nats, expected.nats, rtol=1e-5)
    np.testing.assert_allclose(found.candidate.nats, theirs.nats, rtol=1e-5)
    assert found.reference.summary() == pytest.approx(expected.summary(), rel=1e-5)
    difference = paired_difference(theirs, expected)
    assert found.difference.nll == pytest.approx(difference.nll, rel=1e-4)
    assert found.difference.stderr == pytest.approx(difference.stderr, rel=1e-4)


def test_the_divergence_is_torchs() -> None:
    other = model()
    torch.nn.init.normal_(other.lm_head.weight, std=0.3)
    found = verify(way("a", model()), way("b", other), DOCUMENTS)
    values = []
    for document in DOCUMENTS:
        ids = torch.tensor([document.ids])
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0, :-1].double() for m in (model(), other))
        rows = torch.tensor(document.supervised[1:])
        own = torch.nn.functional.kl_div(
            q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        values.append(own[rows])
    kl = torch.cat(values)
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found.kl_p99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-5)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj", "model.embed_tokens", "lm_head"])
def test_one_wrong_weight_is_found(name: str) -> None:
    """An update with the wrong sign, the smallest way to merge wrongly, in a single matrix."""
    right, wrong = model(), model()
    shape = right.get_parameter(f"{name}.weight").shape
    update = Update(torch.randn(2, shape[1]) * 0.1, torch.randn(shape[0], 2) * 0.1, 0.5)
    right.get_parameter(f"{name}.weight").data += update.delta()
    wrong.get_parameter(f"{name}.weight").data -= update.delta()
    found = verify(way("a", right), way("b", wrong), DOCUMENTS)
    assert any(
        "mean KL" in problem for problem in found.problems(tolerance_of(["F32"], arithmetic="fp32"))
    )


def test_continuations_stop_and_are_as_long_as_asked() -> None:
    prompts = [[i + 1, 5] for i in range(20)]  # more than run at a time
    long = way("a", model()).continuations(prompts)
    assert [len(ids) for ids in long] == [6] * 20
    stop = long[0][2]
    short = way("a", model(), {stop}).continuations(prompts)
    assert all(stop not in ids for ids in short)
    assert len(short) == 20
    assert short[0] == long[0][: long[0].index(stop)]


def test_a_summary_is_json() -> None:
    found = verify(fixed("p", P), fixed("q", Q), [example(2, 0, 2), example(2, 1)])
    summary = json.loads(json.dumps(found.summary()))
    figures = {"difference", "kl_mean", "kl_p99", "prompts", "identical", "agreeing"}
    assert set(summary) == {"reference", "candidate"} | figures
    assert summary["reference"]["name"] == "p"
    assert summary["candidate"]["nll"] == found.candidate.nll


def test_the_coarsest_rounding_decides() -> None:
    fine, half, coarse = (tolerance_of([own], arithmetic="fp32") for own in ("F32", "F16", "BF16"))
    assert fine == Tolerance(kl=1e-6, nll=1e-5)
    assert fine == tolerance_of(["F64"], arithmetic="fp32")
    assert fine.kl < half.kl < coarse.kl
    assert tolerance_of(["BF16", "F32"], arithmetic="fp32") == coarse
    assert tolerance_of(["F32"], arithmetic="bf16").kl > coarse.kl
    assert tolerance_of(["BF16"], arithmetic="fp16") == tolerance_of(["F32"], arithmetic="bf16")
