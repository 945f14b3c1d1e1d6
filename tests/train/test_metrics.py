"""metrics.jsonl: whole lines, and none that a resumed run will write again."""

from __future__ import annotations

import json
from pathlib import Path

from lorikeet.train import MetricsLog, read_metrics


def write(log: MetricsLog, *steps: int) -> None:
    for step in steps:
        log({"step": step, "loss": 1 / step})
        if step % 2 == 0:
            log({"step": step, "eval_nll": 2 / step})


def test_every_line_is_there_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log({"step": step, "loss": 0.1})
        assert (tmp_path / "metrics.jsonl").read_text().splitlines()[-1] == json.dumps(
            {"step": step, "loss": 0.1}
        )


def test_a_new_run_starts_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(MetricsLog(path), 1, 2)
    MetricsLog(path)
    assert read_metrics(path) == []
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_resumed_run_keeps_what_its_checkpoint_knows(tmp_path: Path) -> None:
    straight, resumed = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write(MetricsLog(straight), 1, 2, 3, 4, 5)
    write(MetricsLog(resumed), 1, 2, 3, 4)
    write(MetricsLog(resumed, resume_step=2), 3, 4, 5)
    assert resumed.read_bytes() == straight.read_bytes()


def test_a_line_that_a_kill_cut_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(MetricsLog(path), 1, 2)
    whole = path.read_text()
    for cut in range(1, 12):
        path.write_text(whole + '{"step": 3, "loss": 0.5}'[: 2 * cut])
        assert [line["step"] for line in read_metrics(path)] == [1, 2, 2]
        MetricsLog(path, resume_step=9)
        assert path.read_text() == whole
