"""The heat map: what it shows, and that the same adapter gives the same file."""

from __future__ import annotations

import io
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lorikeet.adapters import Adapter, Update
from lorikeet.adapters.anatomy import Anatomy, examine
from lorikeet.errors import ConfigError, StorageError
from lorikeet.study.plots import plot_anatomy, require_plots

pytest.importorskip("matplotlib")


def adapter(layers: int = 3) -> Adapter:
    updates = {}
    for layer in range(layers):
        for kind, scale in (("self_attn.q_proj", 0.5), ("mlp.up_proj", 1.0 + layer)):
            if layer != 1 or kind != "mlp.up_proj":
                name = f"model.layers.{layer}.{kind}"
                updates[name] = Update(torch.randn(4, 8), torch.randn(6, 4), scale)
    updates["lm_head"] = Update(torch.randn(4, 8), torch.zeros(10, 4), 1.0)
    return Adapter(updates)


@pytest.fixture
def anatomy() -> Anatomy:
    return examine(adapter())


def texts(svg: Path) -> list[str]:
    return re.findall(r"<text[^>]*>(.*?)</text>", svg.read_text(encoding="utf-8"))


def test_an_svg_names_blocks_kinds_and_units(anatomy: Anatomy, tmp_path: Path) -> None:
    plot_anatomy(anatomy, tmp_path / "deep" / "a.svg", title="mine & <yours> $x$")
    shown = texts(tmp_path / "deep" / "a.svg")
    for label in ("q_proj", "up_proj", "lm_head", "0", "1", "2", "other", "block"):
        assert label in shown
    assert "mine &amp; &lt;yours&gt; $x$" in shown
    assert "effective rank (r = 4)" in shown
    assert any(re.fullmatch(r"rms of the update's entries \(1e-?\d+\)", text) for text in shown)
    # 6 modules in 12 places, twice.
    assert shown.count("-") == 2 * 6


def test_figures_stand_in_their_places(anatomy: Anatomy, tmp_path: Path) -> None:
    plot_anatomy(anatomy, tmp_path / "a.svg")
    shown = texts(tmp_path / "a.svg")
    for module in anatomy.modules:
        if module.norm:
            assert f"{module.effective_rank:.1f}" in shown
    weighed = examine(adapter(), lambda name: torch.ones(adapter().updates[name].shape))
    plot_anatomy(weighed, tmp_path / "b.svg")
    shown = texts(tmp_path / "b.svg")
    assert "‖update‖ / ‖W‖ (%)" in shown
    largest = 100 * max(weighed.moved(module) for module in weighed.modules)
    assert f"{largest:.0f}" in shown


def test_the_same_bytes_in_another_process(anatomy: Anatomy, tmp_path: Path) -> None:
    code = (
        "import pickle; from pathlib import Path\n"
        "from lorikeet.study.plots import plot_anatomy\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "anatomy = pickle.loads((folder / 'anatomy').read_bytes())\n"
        "for suffix in ('svg', 'png'):\n"
        "    plot_anatomy(anatomy, folder / f'b.{suffix}', title='t')\n"
    )
    (tmp_path / "anatomy").write_bytes(pickle.dumps(anatomy))
    subprocess.run([sys.executable, "-c", code], check=True)
    for suffix in ("svg", "png"):
        plot_anatomy(anatomy, tmp_path / f"a.{suffix}", title="t")
        first, second = (tmp_path / f"{name}.{suffix}" for name in "ab")
        assert first.read_bytes() == second.read_bytes()
        assert b"<dc:date>" not in first.read_bytes()


def test_a_png_is_a_picture_with_both_panels(anatomy: Anatomy, tmp_path: Path) -> None:
    plot_anatomy(anatomy, tmp_path / "a.PNG")
    with Image.open(io.BytesIO((tmp_path / "a.PNG").read_bytes())) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    height, width = pixels.shape[:2]
    assert width > height > 200
    coloured = (pixels.max(axis=2) - pixels.min(axis=2)) > 40
    for half in (coloured[:, : width // 2], coloured[:, width // 2 :]):
        assert half.mean() > 0.1


def test_an_untrained_adapter_can_be_drawn(tmp_path: Path) -> None:
    update = Update(torch.randn(4, 8), torch.zeros(6, 4), 1.0)
    plot_anatomy(examine(Adapter({"model.layers.0.q_proj": update})), tmp_path / "a.svg")
    assert texts(tmp_path / "a.svg").count("0.00") == 2


def test_many_blocks_are_not_all_named(tmp_path: Path) -> None:
    plot_anatomy(examine(adapter(layers=90)), tmp_path / "a.svg")
    shown = texts(tmp_path / "a.svg")
    assert {"0", "3", "87", "other"} <= set(shown)
    assert "1" not in shown


def test_other_suffixes_are_refused(anatomy: Anatomy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.png or \.svg"):
        plot_anatomy(anatomy, tmp_path / "a.pdf")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(anatomy: Anatomy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        plot_anatomy(anatomy, tmp_path / "file" / "a.svg")


def test_a_picture_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'lorikeet\[plots\]'"):
        require_plots(Path("a.png"))
