"""`lorikeet adapter combine` and `lorikeet adapter normalize`, from folders to folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorikeet.adapters import Adapter, Update, read_adapter, write_adapter
from lorikeet.cli.main import main


def make(folder: Path, seed: int, *, r: int = 2, fingerprint: str = "5" * 64) -> Path:
    """Write a random adapter of two modules; return its folder."""
    generator = torch.Generator().manual_seed(seed)
    updates = {
        name: Update(
            torch.randn(own, 6, generator=generator), torch.randn(8, own, generator=generator), 0.5
        )
        for name, own in (("h.0.q", r), ("h.1.q", r + 1))
    }
    write_adapter(Adapter(updates, "base", {"base_fingerprint": fingerprint}), folder)
    return folder


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run a command that must succeed; return its stdout."""
    code = main(["adapter", *map(str, argv)])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return shown.out


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run a command that must be refused with exit code 2; return its message."""
    assert main(["adapter", *map(str, argv)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    return shown.err


def delta(folder: Path, module: str = "h.0.q") -> torch.Tensor:
    return read_adapter(folder).updates[module].delta()


def test_a_weighted_sum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make(tmp_path / "a", 1), make(tmp_path / "run" / "adapter", 2, r=4)
    shown = json.loads(
        call(capsys, "combine", a, f"{b.parent}=-0.5", "--out", tmp_path / "new" / "c", "--json")
    )
    assert shown == {
        "out": str(tmp_path / "new" / "c"),
        "modules": 2,
        "rank_max": 8,
        "errors": {"max": 0.0, "mean": 0.0, "per_module": {"h.0.q": 0.0, "h.1.q": 0.0}},
    }
    for module in ("h.0.q", "h.1.q"):
        wanted = delta(a, module) - 0.5 * delta(b, module)
        torch.testing.assert_close(delta(tmp_path / "new" / "c", module), wanted)
    sources = read_adapter(tmp_path / "new" / "c").provenance["combined"]["sources"]
    assert [source["weight"] for source in sources] == [1.0, -0.5]


def test_a_table_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, out = make(tmp_path / "a", 1), make(tmp_path / "b", 2), tmp_path / "c"
    shown = call(capsys, "combine", a, b, "--out", out, "--rank", 3)
    figures = {row.split("│")[1].strip(): row.split("│")[2].strip() for row in shown.splitlines()
               if row.count("│") == 3}  # fmt: skip
    found = json.loads(call(capsys, "combine", a, b, "--out", out, "--rank", 3, "--json"))
    assert figures["modules"] == "2"
    assert figures["ranks before"] == "2-3, 2-3"
    assert figures["rank after"] == "3"
    assert figures["largest relative error"] == f"{found['errors']['max']:.2g}"
    assert figures["mean relative error"] == f"{found['errors']['mean']:.2g}"
    assert found["errors"]["max"] > found["errors"]["mean"] > 0.01


def test_an_error_that_must_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, out = make(tmp_path / "a", 1), make(tmp_path / "b", 2), tmp_path / "c"
    found = json.loads(call(capsys, "combine", a, b, "--out", out, "--error", 0.4, "--json"))
    assert 0 < found["errors"]["max"] <= 0.4
    lost = (delta(out) - delta(a) - delta(b)).norm() / (delta(a) + delta(b)).norm()
    assert found["errors"]["per_module"]["h.0.q"] == pytest.approx(float(lost), abs=1e-5)


def test_merging_number_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make(tmp_path / "a", 1), make(tmp_path / "b", 2)
    argv = ["combine", a, b, "--method", "dare", "--density", 0.5, "--rank", 6]
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        call(capsys, *argv, "--seed", seed, "--out", tmp_path / name)
    one, again, two = (delta(tmp_path / name) for name in ("one", "again", "two"))
    assert torch.equal(one, again)
    assert not torch.allclose(one, two, atol=0.1)
    call(capsys, "combine", a, "--method", "ties", "--density", 0.25, "--rank", 6,
         "--out", tmp_path / "ties")  # fmt: skip
    assert int((delta(tmp_path / "ties").abs() > 1e-4).sum()) == 12  # of 48


def test_a_folder_with_an_equals_sign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, out = make(tmp_path / "rate=1e-4", 1), tmp_path / "out"
    call(capsys, "combine", a, "--out", out)
    torch.testing.assert_close(delta(out), delta(a))
    call(capsys, "combine", f"{a}=2", "--out", out)  # an older result may be replaced
    torch.testing.assert_close(delta(out), 2 * delta(a))


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, out = make(tmp_path / "a", 1), tmp_path / "out"
    message = refusal(capsys, "combine", f"{a}=x", "b=y", "--out", out)
    assert "'x' is no number" in message
    assert "'y' is no number" in message
    message = refusal(capsys, "combine", tmp_path / "no", f"{tmp_path}=2", a, "--out", out)
    assert f"no adapter in {tmp_path / 'no'}" in message
    assert f"no adapter in {tmp_path}:" in message
    message = refusal(capsys, "combine", f"{a}=nan", "--out", out, "--rank", 0)
    assert "nan" in message
    assert "rank is 0" in message
    assert "density" in refusal(capsys, "combine", a, "--out", out, "--density", 0.5)
    assert not out.exists()


def test_no_input_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    a = make(run / "adapter", 1)
    before = {path: path.read_bytes() for path in a.iterdir()}
    (tmp_path / "link").symlink_to(a)
    for out in (a, run, tmp_path / "link", tmp_path, a / ".." / "adapter"):
        for verb in ("combine", "normalize"):
            assert "would replace" in refusal(capsys, verb, run, "--out", out)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").write_text("mine", encoding="utf-8")
    assert "is not empty" in refusal(capsys, "combine", a, "--out", tmp_path / "thesis")
    assert "is a file" in refusal(capsys, "combine", a, "--out", tmp_path / "thesis" / "text")
    assert {path: path.read_bytes() for path in a.iterdir()} == before


def test_other_bases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make(tmp_path / "a", 1), make(tmp_path / "b", 2, fingerprint="6" * 64)
    argv = ["combine", a, b, "--out", tmp_path / "out"]
    message = refusal(capsys, *argv)
    assert "555555555555" in message
    assert "666666666666" in message
    assert main(["adapter", *map(str, argv), "--allow-mismatch", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["modules"] == 2
    assert shown.err.startswith("warning: ")


@pytest.mark.parametrize(
    ("weights", "warned"),
    [((1, -1), True), ((0.1, 0.2, -0.3), True), ((1, -0.999), False), ((1, -1, 1), False)],
)
@pytest.mark.parametrize("flags", [(), ("--error", "0.01"), ("--rank", "1")])
def test_a_sum_of_nothing_is_told(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    weights: tuple[float, ...],
    warned: bool,
    flags: tuple[str, ...],
) -> None:
    a = make(tmp_path / "a", 1)
    argv = [*(f"{a}={weight}" for weight in weights), "--out", str(tmp_path / "out"), *flags]
    assert main(["adapter", "combine", *argv]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert ("nothing is left of the updates" in said) == warned


def test_normalize(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, out = make(tmp_path / "a", 1), tmp_path / "out"
    found = json.loads(call(capsys, "normalize", a, "--out", out, "--json"))
    assert set(found) == {"out", "modules", "rank_max", "errors"}
    assert (found["rank_max"], found["errors"]["max"]) == (3, 0)
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 3, {})
    for module in ("h.0.q", "h.1.q"):
        torch.testing.assert_close(delta(out, module), delta(a, module))
    assert config["lorikeet"]["base_fingerprint"] == "5" * 64


def test_normalize_a_dora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = read_adapter(make(tmp_path / "plain", 1))
    updates = {m: replace(u, magnitude=torch.rand(8) + 1) for m, u in plain.updates.items()}
    write_adapter(replace(plain, updates=updates), tmp_path / "dora")
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    weights = {name: torch.randn(8, 6) for name in ("h.0.q", "h.1.q")}
    save_file(
        {f"transformer.{m}.weight": w for m, w in weights.items()}, model / "model.safetensors"
    )
    assert "--model" in refusal(capsys, "normalize", tmp_path / "dora", "--out", out)
    message = refusal(capsys, "combine", tmp_path / "dora", "--out", out)
    assert "lorikeet adapter normalize --model" in message
    message = refusal(
        capsys, "normalize", tmp_path / "dora", "--model", tmp_path / "no", "--out", out
    )
    assert "no model folder" in message
    message = refusal(capsys, "normalize", tmp_path / "dora", "--model", model, "--out", model)
    assert "would replace" in message
    found = json.loads(
        call(
            capsys,
            *("normalize", tmp_path / "dora", "--model", model, "--rank", 4),
            *("--out", out, "--json"),
        )
    )
    for module, weight in weights.items():
        change = updates[module].applied(weight) - weight
        lost = float((delta(out, module) - change).norm() / change.norm())
        assert found["errors"]["per_module"][module] == pytest.approx(lost, abs=1e-5)
        assert lost > 0.01
