"""Clock and memory counter of a worker's device."""

from __future__ import annotations

import torch

from benchmarks.protocol import Meter


def meter_of(device: str) -> Meter:
    """The meter of cpu or cuda.

    A GPU works on after a call has returned, and its memory is that of torch's own allocator: the
    driver's figure would hold what the allocator keeps for later, too.

    Raises:
        SystemExit: this environment's torch sees no GPU.
    """
    if device == "cpu":
        return Meter()
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} of this environment sees no GPU")
    return Meter(
        settle=torch.cuda.synchronize,
        restart=torch.cuda.reset_peak_memory_stats,
        peak_bytes=torch.cuda.max_memory_allocated,
    )
