"""Training: the one loop, its optimizer, its state and what it writes down."""

from lorikeet.train.loop import Hooks, fit
from lorikeet.train.metrics import MetricsLog, TensorBoard, read_metrics
from lorikeet.train.optimizer import Optimizer
from lorikeet.train.schedule import Schedule
from lorikeet.train.setup import Setup, Steps, set_up
from lorikeet.train.state import Checkpoints, Sparing, TrainState

__all__ = [
    "Checkpoints",
    "Hooks",
    "MetricsLog",
    "Optimizer",
    "Schedule",
    "Setup",
    "Sparing",
    "Steps",
    "TensorBoard",
    "TrainState",
    "fit",
    "read_metrics",
    "set_up",
]
