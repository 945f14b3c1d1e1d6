"""The page in a real browser, where one is installed: as wide as a phone, and sorted by a click."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from made_up import STUDIES

from lorikeet.study.report import write_report

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

# The report stands in a frame of a phone's width, whose media queries see that width.
PROBE = """<!DOCTYPE html><meta charset="utf-8"><title>waiting</title>
<iframe width="390" height="800" srcdoc="{report}"></iframe>
<script>
const problems = [];
document.querySelector("iframe").addEventListener("load", event => {
  const page = event.target.contentDocument, root = page.documentElement;
  const names = () => [...page.querySelectorAll("#results tbody th")].map(head => head.textContent);
  const found = {width: root.clientWidth, overflow: root.scrollWidth - root.clientWidth};
  found.wide = [...page.querySelectorAll("svg")].filter(
    svg => svg.getBoundingClientRect().right > root.clientWidth).length;
  found.before = names();
  const heads = [...page.querySelectorAll("#results th button")];
  heads.find(b => b.textContent.startsWith("perplexity")).click();
  found.after = names();
  found.sorted = page.querySelector("#results th[aria-sort]").getAttribute("aria-sort");
  document.title = JSON.stringify(found);
});
</script>
"""


def seen(folder: Path) -> dict[str, Any]:
    """What a browser makes of a report."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("needs Chromium or Chrome")
    report = (folder / "report.html").read_text(encoding="utf-8")
    probe = folder / "probe.html"
    probe.write_text(PROBE.replace("{report}", html.escape(report)), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000"]
    done = subprocess.run([*command, probe.as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr
    found: dict[str, Any] = json.loads(html.unescape(title[1]))
    return found


@pytest.mark.parametrize("name", ["comparison", "long", "rates"])
def test_a_phone_shows_the_page_without_scrolling_aside(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_report(STUDIES[name](), tmp_path)
    found = seen(tmp_path)
    assert 370 <= found["width"] <= 390
    assert found["overflow"] == 0
    assert found["wide"] == 0


def test_a_click_sorts_the_results(tmp_path: Path) -> None:
    write_report(STUDIES["comparison"](), tmp_path)
    found = seen(tmp_path)
    assert found["before"] == ["base", "lora", "dora", "lora-r64", "full"]
    assert found["after"] == ["full", "lora-r64", "dora", "lora", "base"]
    assert found["sorted"] == "ascending"
