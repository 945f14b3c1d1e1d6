"""Every picture that a study has the data for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorikeet.study.outcomes import Outcome
from lorikeet.study.plots.curves import plot_losses, plot_rates, plot_validations
from lorikeet.study.plots.heat_map import plot_heat_map
from lorikeet.study.plots.options import numeric_options, plot_option
from lorikeet.study.plots.results import plot_differences, plot_perplexities
from lorikeet.study.plots.style import Picture, styled
from lorikeet.study.plots.tradeoffs import PRICES, Price, plot_forgetting, plot_front
from lorikeet.study.record import Study


def draw(study: Study, outcomes: Sequence[Outcome]) -> list[Picture]:
    """Draw what there is to draw, results first. The same study gives the same bytes.

    Args:
        study: the study.
        outcomes: from `outcomes(study)`.
    """
    with styled():
        made = [
            plot_perplexities(outcomes),
            plot_differences(outcomes),
            *(plot_option(study, outcomes, option) for option in numeric_options(study)),
            plot_heat_map(study, outcomes),
            *(plot_front(outcomes, price) for price in _prices(outcomes)),
            plot_forgetting(outcomes, study.other_name),
            plot_losses(outcomes),
            plot_validations(outcomes),
            plot_rates(study, outcomes),
        ]
    return [picture for picture in made if picture is not None]


def _prices(outcomes: Sequence[Outcome]) -> list[Price]:
    """What groups differ in; one price of two that order them alike."""
    orders: dict[tuple[float, ...], Price] = {}
    for price in PRICES:
        costs = [price.of(outcome) for outcome in outcomes if not outcome.is_base]
        middles = [cost[1] if cost else math.nan for cost in costs]
        ranks = {value: float(rank) for rank, value in enumerate(sorted(set(middles)))}
        orders.setdefault(tuple(ranks.get(value, math.nan) for value in middles), price)
    return list(orders.values())
