"""The device that everybody runs on, as far as it goes without a GPU."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import chosen, main, parser
from benchmarks.contestants import CONTESTANTS, DEFAULT
from benchmarks.device import describe_machine, driver_version, gpu_line
from benchmarks.process import BenchmarkError, Places, Worker
from benchmarks.roofline import Shape
from benchmarks.rounds import gemm_of, make_job
from benchmarks.workers.meter import meter_of
from benchmarks.workload import dense

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(sys.executable)
SHAPE = Shape(linears=((2, 3, 4),), head=(2, 10), layers=2, attention_width=5, vocabulary=9)

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(
        python=PYTHON, peers_python=PYTHON, unsloth_python=PYTHON, folder=tmp_path, timeout=60
    )


@without_gpu
@pytest.mark.parametrize("verb", ["run", "parity", "scaling"])
def test_a_gpu_that_is_not_there_is_refused_first(
    verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Before the folder of the model, which is not there either, is looked at."""
    assert main([verb, "--device", "cuda", "--model", str(tmp_path / "none")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: --device cuda needs a GPU, and torch ")
    assert "use --device cpu" in said.err
    assert not said.out


def test_another_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--device", "tpu"])
    assert "invalid choice: 'tpu'" in capsys.readouterr().err


def test_the_cpu_is_the_default() -> None:
    options = parser().parse_args(["run"])
    assert (options.device, options.contestants) == ("cpu", None)


@without_gpu
def test_a_worker_whose_torch_sees_no_gpu_says_so(places: Places) -> None:
    """The environments differ: that of Lorikeet may see the GPU, another not."""
    workload = dense(SHAPE.vocabulary, steps=1, examples=1, length=4)
    job = make_job(
        places.folder / "nowhere", workload, replace(places, device="cuda"), dtype="bf16", r=4
    )
    assert job.device == "cuda"
    gemm = gemm_of(SHAPE)
    with (
        Worker(gemm, replace(job, settings=gemm.settings), places) as worker,
        pytest.raises(BenchmarkError, match="of this environment sees no GPU"),
    ):
        worker.wait_ready()
    with pytest.raises(SystemExit, match="sees no GPU"):
        meter_of("cuda")


@pytest.mark.parametrize(
    ("device", "outside", "inside"),
    [
        ("cpu", None, ""),
        ("cpu", "0", ""),
        ("cuda", None, "0"),
        ("cuda", "3", "3"),
        ("cuda", "3,5", "3"),
        ("cuda", "GPU-8932f937,GPU-1", "GPU-8932f937"),
    ],
)
def test_workers_see_no_gpu_or_one(
    device: str, outside: str | None, inside: str, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if outside is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", outside)
    found = replace(places, device=device).environment(CONTESTANTS["lorikeet"])
    assert found["CUDA_VISIBLE_DEVICES"] == inside


def test_everybody_compiles_to_a_place_of_its_own(places: Places) -> None:
    named = {
        places.environment(CONTESTANTS[name])["UNSLOTH_COMPILE_LOCATION"]
        for name in ("unsloth-default", "unsloth-tuned")
    }
    assert len(named) == 2
    assert all(Path(name).parent == places.folder for name in named)


def test_who_takes_part_when_nobody_is_named() -> None:
    assert DEFAULT["cpu"] == ["lorikeet", "trl-default", "trl-tuned", "peft-tuned", "peft-full"]
    for device, names in DEFAULT.items():
        assert [contestant.name for contestant in chosen(names, device)] == names
    assert {"lorikeet-full", "peft-default", "unsloth-default"} < set(DEFAULT["cuda"])


def test_unsloth_is_refused_on_a_cpu(stories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = "lorikeet,unsloth-default,unsloth-tuned"
    assert main(["run", "--model", str(stories), "--contestants", names]) == 2
    said = capsys.readouterr().err
    assert "unsloth-default, unsloth-tuned cannot take part with --device cpu" in said


def test_without_unsloth_it_says_how_to_build_it(places: Places) -> None:
    missing = replace(places, unsloth_python=places.folder / "none")
    with pytest.raises(
        BenchmarkError, match=r"needs the environment unsloth.*benchmarks/unsloth\.txt"
    ):
        missing.interpreter(CONTESTANTS["unsloth-default"])


def test_unsloth_shares_the_versions_that_it_can() -> None:
    def versions(name: str) -> dict[str, str]:
        text = (ROOT / name).read_text(encoding="utf-8")
        return dict(re.findall(r"^([\w-]+)==([\w.]+)", text, re.MULTILINE))

    pinned, shared = versions("benchmarks/unsloth.txt"), versions("constraints.txt")
    for name in ("torch", "peft", "accelerate"):
        assert pinned[name] == shared[name]


def test_the_driver_is_what_nvidias_tool_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_version() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 570.86.15\necho 570.86.15\n", encoding="ascii")
    tool.chmod(0o755)
    assert driver_version() == "570.86.15"
    tool.write_text("#!/bin/sh\nexit 9\n", encoding="ascii")
    assert driver_version() is None


def test_the_line_above_the_tables_of_a_gpu() -> None:
    machine = {
        "gpu": "NVIDIA H100 80GB HBM3",
        "gpu_memory_bytes": 80 * 2**30,
        "driver": None,
        "cuda": "13.0",
        "torch": "2.13.0",
    }
    expected = "NVIDIA H100 80GB HBM3, 80 GiB, driver unknown, CUDA 13.0, torch 2.13.0"
    assert gpu_line(machine) == expected
    assert describe_machine("cpu")["device"] == "cpu"
