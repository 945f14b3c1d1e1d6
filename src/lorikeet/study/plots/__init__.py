"""Pictures. matplotlib is needed for them alone, and imported when one is asked for."""

from lorikeet.study.plots.anatomy import plot_anatomy
from lorikeet.study.plots.style import require_plots

__all__ = ["plot_anatomy", "require_plots"]
