"""Training steps of small models as CUDA graphs: thousands of small kernels started as one.

A model of less than a billion parameters keeps a GPU waiting for Python. So the forward and
backward pass over a row of given sizes is recorded once, and replayed for every row of these sizes
with other numbers in the same memory. What a recording gives is compared with what it recorded
before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorikeet import console
from lorikeet.data.batch import Batch
from lorikeet.kernels import attention
from lorikeet.model.fast import FastNll
from lorikeet.model.loss import TokenNll
from lorikeet.model.row import SITES, Row, Sizes, coarse, dropout_keys, recordable

SMALL = 1_000_000_000
"""Models of fewer parameters wait for the launches of kernels."""

MOST = 32
"""Graphs that are kept; rows of yet other sizes run as they are."""

_TOLERANCE = 1e-2  # of all gradients' norm: sums by atomics come in any order

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Record what a function does to tensors; the result does it again in the same memory."""


def graphed(model: nn.Module, fast: FastNll) -> TokenNll:
    """The loss for training a model: recorded where that pays and can be done."""
    return GraphedNll(model, fast) if suits(model) else fast


def suits(model: nn.Module) -> bool:
    """Whether a model's steps are worth recording, and can be."""
    weight = next(model.parameters())
    if not weight.is_cuda or sum(p.numel() for p in model.parameters()) >= SMALL:
        return False
    return weight.dtype == torch.bfloat16 and attention.flash_missing() is None


def cuda_recorder() -> Record:
    """Record CUDA graphs that share their memory: each is replayed, read, and done with."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            run()
        return graph.replay

    return record


class GraphedNll:
    """The fast path's loss in training, from recordings where there are some.

    Sizes of a row are recorded when they come up for the second time: the first time everything is
    compiled that needs to be, and many sizes never come again.

    Args:
        model: must not change in anything but the values of its parameters.
        fast: what is recorded.
        record: how; CUDA graphs if None.

    Attributes:
        parameters: what is trained.
        gradients: those of the last replay's losses, in memory that all graphs share.
        replays: how many there were.
    """

    def __init__(self, model: Any, fast: FastNll, *, record: Record | None = None) -> None:
        self.model = model
        self.fast = fast
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.gradients = [torch.empty_like(p) for p in self.parameters]
        self.replays = 0
        self._record: Record | None = record or cuda_recorder()
        self._graphs: dict[Sizes, _Graph] = {}
        self._seen: set[Sizes] = set()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Nats of each supervised token, [S]; only their sum has a gradient."""
        assert model is self.model
        if not (model.training and torch.is_grad_enabled()):
            return self.fast(model, batch)
        sizes = coarse(batch)
        graph = self._graphs.get(sizes) or self._recorded(batch, sizes)
        if graph is None:
            return self.fast(model, batch)
        row = recordable(batch, sizes, dropout_keys(model))
        return _Replay.apply(graph, row, batch.supervised_tokens, *self.parameters)

    def _recorded(self, batch: Batch, sizes: Sizes) -> _Graph | None:
        """A new graph for rows of these sizes, or None if the batch is to run as it is."""
        if sizes not in self._seen or self._record is None or len(self._graphs) >= MOST:
            self._seen.add(sizes)
            return None
        keys = [0] * (SITES * self.model.config.num_hidden_layers)
        try:
            graph = _Graph(self, recordable(batch, sizes, keys))
            error = graph.record(self._record)
        except RuntimeError as failure:
            self._give_up(f"{type(failure).__name__}: {str(failure).splitlines()[0]}")
            return None
        if not error <= _TOLERANCE:
            self._give_up(f"what one replays is {error:.1e} off (at most {_TOLERANCE:.0e})")
            return None
        self._graphs[sizes] = graph
        return graph

    def _give_up(self, reason: str) -> None:
        console.warn(f"steps are not recorded as CUDA graphs: {reason}")
        self._record = None


class _Graph:
    """A forward and backward pass over a row in memory of its own.

    Attributes:
        of: whose it is.
        losses: float32 [S], of the last replay.
        gradients: of their sum, by parameter, in `of.gradients`; None where they do not depend on
            one.
    """

    def __init__(self, of: GraphedNll, row: Row) -> None:
        self.of = of
        self.losses = row.ids.new_empty(0)
        self.gradients: list[Tensor | None] = []
        self._row = row
        self._again: Callable[[], None] = self._run

    def record(self, record: Record) -> float:
        """Record the pass; return how far its replay is off, relative to what it should be."""
        gpus = [self._row.ids.device] if self._row.ids.is_cuda else []
        with torch.random.fork_rng(gpus):  # an adapted head draws its dropout from there
            torch.manual_seed(0)
            self._run()
            losses = self.losses.clone()
            gradients = [gradient.clone() for gradient in _present(self.gradients)]
            self._again = record(self._run)
            torch.manual_seed(0)
            self.replay(self._row)
        return _gap([self.losses], [losses]) + _gap(_present(self.gradients), gradients)

    def replay(self, row: Row) -> None:
        """Run the pass over another row of the same sizes."""
        for own, new in zip(_inputs(self._row), _inputs(row), strict=True):
            own.copy_(new)
        self._again()
        self.of.replays += 1

    def _run(self) -> None:
        of = self.of
        with torch.enable_grad():
            losses = of.fast.of_row(of.model, self._row)
            found = torch.autograd.grad(losses.sum(), of.parameters, allow_unused=True)
        self.losses = losses.detach()
        pairs = zip(of.gradients, found, strict=True)
        self.gradients = [None if new is None else own for own, new in pairs]
        torch._foreach_copy_(_present(self.gradients), _present(found))


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, row: Row, count: int, *parameters: Tensor) -> Tensor:
        graph.replay(row)
        ctx.graph, ctx.replay = graph, graph.of.replays
        return graph.losses[:count].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnll: Tensor) -> tuple[Tensor | None, ...]:
        graph: _Graph = ctx.graph
        if graph.of.replays != ctx.replay:
            raise RuntimeError("the gradients of this pass have made room for those of a later one")
        if len(dnll) > 1 and dnll.stride() != (0,):
            raise RuntimeError("a recorded pass knows the gradients of its losses' sum alone")
        scaled = iter(torch._foreach_mul(_present(graph.gradients), dnll[:1].sum()))
        own = [None if gradient is None else next(scaled) for gradient in graph.gradients]
        return None, None, None, *own


def _inputs(row: Row) -> list[Tensor]:
    """The tensors of a row, in one order."""
    found = (row.ids, row.positions, row.cu_seqlens, row.rows, row.targets, row.keys)
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _gap(found: list[Tensor], expected: list[Tensor]) -> float:
    """|found - expected| / |expected|, each taken as one vector; 0 where both are."""
    difference = float(torch.nn.utils.get_total_norm(torch._foreach_sub(found, expected)))
    norm = float(torch.nn.utils.get_total_norm(expected))
    return difference / max(norm, 1e-30) if difference else 0.0
