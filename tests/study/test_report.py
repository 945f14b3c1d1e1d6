"""What a study leaves behind: the files, their figures, and that they are the same every time."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from made_up import NASTY, STUDIES, comparison, tiny
from rich.cells import cell_len
from rich.console import Console

from lorikeet.evaluate import paired_difference
from lorikeet.study.record import Cost, Study
from lorikeet.study.report import console_table, write_report
from lorikeet.study.statistics import difference, estimate

Reported = Callable[[str], tuple[Path, dict[str, Any]]]
FILES = {"metrics.json", "experiment_table.md", "costs.md", "samples.jsonl", "report.html", "plots"}


@pytest.fixture(scope="module")
def written(reported: Reported) -> dict[str, Path]:
    """Every study's folder."""
    pytest.importorskip("matplotlib")
    return {name: reported(name)[0] for name in STUDIES}


class Elsewhere(NamedTuple):
    """What another process wrote: two studies, before them one as if matplotlib were missing."""

    folder: Path
    without: Path
    stderr: str


AGAIN = ("grid", "comparison")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    folder = tmp_path_factory.mktemp("elsewhere")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "sys.modules['matplotlib'] = None\n"
        "from pathlib import Path; from made_up import STUDIES\n"
        "from lorikeet.study.report import write_report\n"
        f"folder = Path({str(folder)!r})\n"
        "write_report(STUDIES['comparison'](), folder / 'without')\n"
        "del sys.modules['matplotlib']\n"
        f"for name in {AGAIN!r}:\n"
        "    write_report(STUDIES[name](), folder / name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    return Elsewhere(folder, folder / "without", done.stderr)


def read(folder: Path, name: str) -> str:
    return (folder / name).read_text(encoding="utf-8")


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.parametrize("name", STUDIES)
def test_all_files_are_there_and_no_drafts(written: dict[str, Path], name: str) -> None:
    assert {path.name for path in written[name].iterdir()} == FILES
    pictures = [path.name for path in (written[name] / "plots").iterdir()]
    assert {p.removesuffix(".svg") for p in pictures if p.endswith(".svg")} == {
        p.removesuffix(".png") for p in pictures if p.endswith(".png")
    }


@pytest.mark.parametrize("name", STUDIES)
def test_metrics_are_json_with_every_trial(written: dict[str, Path], name: str) -> None:
    found = json.loads(read(written[name], "metrics.json"), parse_constant=refuse)
    study = STUDIES[name]()
    assert found["kind"] == study.kind
    assert [run["name"] for run in found["runs"]] == [trial.name for trial in study.trials]
    wanted = {"method", "r", "rows", "seed", "trainable", "seconds", "tokens_per_second"}
    wanted |= {"peak_memory", "nll", "nll_stderr", "perplexity"}
    assert all(wanted <= set(run) for run in found["runs"])


def test_metrics_hold_the_figures_of_the_groups(written: dict[str, Path]) -> None:
    study = comparison()
    groups = {
        group["label"]: group
        for group in json.loads(read(written["comparison"], "metrics.json"))["groups"]
    }
    base = study.base
    assert base and base.test and list(groups) == ["base", "lora", "dora", "lora-r64", "full"]
    for group in study.groups:
        found, expected = groups[group.label], estimate(group.tests)
        assert found["seeds"] == [0, 1, 2]
        assert found["estimate"]["nll"] == expected.nll
        assert found["perplexity"] == math.exp(expected.nll)
        assert found["perplexity_interval95"] == list(expected.perplexity_interval or ())
        gap = difference(group.tests, [base.test])
        assert found["difference_to_base"]["nll"] == gap.nll
        mean = sum(paired_difference(test, base.test).nll for test in group.tests) / 3
        assert gap.nll == pytest.approx(mean, abs=1e-12)


def rows(markdown: str, heading: str) -> list[dict[str, str]]:
    """The table under a heading: a dict for each row."""
    section = markdown.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    table = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(table[0], line, strict=True)) for line in table[2:]]


def test_the_table_shows_what_was_computed(written: dict[str, Path]) -> None:
    study = comparison()
    found = {
        row["method"]: row
        for row in rows(read(written["comparison"], "experiment_table.md"), "Results")
    }
    base = study.base
    assert base and base.test and base.other
    assert set(found) == {"base", "lora", "dora", "lora-r64", "full"}
    for group in study.groups:
        row, test = found[group.label], estimate(group.tests)
        low, high = test.perplexity_interval or (0, 0)
        assert row["perplexity [95 %]"] == f"{test.perplexity:.3f} [{low:.3f}, {high:.3f}]"
        gap = difference(group.tests, [base.test])
        shown = f"{gap.nll:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"
        assert row["difference to base [95 %]"] == shown
        assert row["test nll"] == f"{test.nll:.4f}"
        assert row["seeds"] == "0-2"
        others = [trial.other for trial in group.trials if trial.other]
        assert row["wikitext: perplexity"] == f"{estimate(others).perplexity:.2f}"
        assert row["forgotten [95 %]"].startswith(f"{difference(others, [base.other]).nll:+.4f} [")
    assert found["full"]["trained"] == "134,515,008"
    assert found["full"]["share"] == "100.00 %"
    assert found["lora"]["saved"] == "19.6 MB"
    assert found["full"]["learning rate"] == "2e-5"


def test_the_grids_say_what_was_picked_and_what_failed(written: dict[str, Path]) -> None:
    found = rows(
        read(written["comparison"], "experiment_table.md"), "Learning rates that were tried"
    )
    by_rate = {row["learning rate"]: row for row in found}
    assert by_rate["2e-4"]["lora"] == "1.3100 (picked)"
    assert by_rate["8e-4"]["lora"] == "1.4304"
    assert by_rate["8e-5"]["full"] == "failed"
    assert by_rate["8e-5"]["lora"] == ""


@pytest.mark.parametrize("name", STUDIES)
def test_tables_are_aligned_in_the_raw_text(written: dict[str, Path], name: str) -> None:
    for file in ("experiment_table.md", "costs.md"):
        blocks = re.findall(r"(?:^\|.*\|\n)+", read(written[name], file), re.MULTILINE)
        assert all(len({cell_len(line) for line in block.splitlines()}) == 1 for block in blocks)


def test_the_same_bytes_in_another_process(written: dict[str, Path], elsewhere: Elsewhere) -> None:
    for name in AGAIN:
        files = [path for path in written[name].rglob("*") if path.is_file()]
        assert len(files) > 10
        for file in files:
            again = elsewhere.folder / name / file.relative_to(written[name])
            assert again.read_bytes() == file.read_bytes(), file.name


def slower(study: Study) -> Study:
    """The same study, done on a slower machine with more memory, elsewhere."""
    trials = [
        replace(t, cost=t.cost and Cost(3 * t.cost.seconds, 2 * (t.cost.peak_memory or 0)))
        for t in study.trials
    ]
    receipt = {**study.receipt, "machine": {"processor": "another"}, "loads": {"base": 2}}
    config = {**study.config, "model": {**study.config["model"], "path": "/else/SmolLM-135M"}}
    config |= {"out": "/another/place"}
    return replace(study, trials=trials, receipt=receipt, config=config)


def test_no_clock_and_no_place_in_the_experiment_table(
    written: dict[str, Path], tmp_path: Path
) -> None:
    write_report(slower(comparison()), tmp_path)
    table = read(tmp_path, "experiment_table.md")
    assert table == read(written["comparison"], "experiment_table.md")
    assert read(tmp_path, "costs.md") != read(written["comparison"], "costs.md")
    assert "/somewhere" not in table and "/else" not in table and "…/SmolLM-135M" in table
    assert "path: data/train.jsonl" in table


def test_costs_are_medians_with_their_spread(written: dict[str, Path]) -> None:
    found = {row["group"]: row for row in rows(read(written["comparison"], "costs.md"), "By group")}
    group = next(group for group in comparison().groups if group.label == "full")
    low, middle, high = sorted(trial.cost.seconds for trial in group.trials if trial.cost)
    assert found["full"]["seconds in steps"] == f"{middle:.0f} ({low:.0f} to {high:.0f})"
    assert found["full"]["peak memory"] == "2.10 GB"
    assert "base" not in found


def test_samples_hold_every_answer(written: dict[str, Path]) -> None:
    study = comparison()
    lines = [json.loads(line) for line in read(written["comparison"], "samples.jsonl").splitlines()]
    assert [line["prompt"] for line in lines] == [question.prompt for question in study.questions]
    for trial in study.trials:
        assert [line["answers"][trial.name] for line in lines] == list(trial.answers)


def test_samples_in_markdown_cannot_leave_their_fence(tmp_path: Path) -> None:
    study = comparison(seeds=1)
    trials = [replace(t, answers=["```\n# out\n````"] * len(t.answers)) for t in study.trials]
    write_report(replace(study, trials=trials), tmp_path)
    text = read(tmp_path, "experiment_table.md")
    samples = text.split("## Answers side by side\n")[1].split("\n## ")[0]
    fences = [line for line in samples.splitlines() if line.startswith("`````")]
    assert len(fences) == 6
    assert not any(line.startswith("# ") for line in samples.splitlines())


class Page(HTMLParser):
    """What a browser would find in a page: its elements with their attributes, its texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data: str) -> None:
        self.texts[self.inside] = self.texts.get(self.inside, "") + data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_asks_nothing_of_a_network(written: dict[str, Path], name: str) -> None:
    page = Page(read(written[name], "report.html"))
    for tag, attributes in page.elements:
        for key, value in attributes.items():
            if key in ("href", "src", "xlink:href", "srcset", "action", "data", "poster"):
                assert value is not None and value.startswith(("#", "data:image/png;")), (
                    tag,
                    value,
                )
            elif not key.startswith("xmlns"):
                assert "http" not in (value or "").replace("http-equiv", ""), (tag, key, value)
            assert all(url.startswith("#") for url in re.findall(r"url\((.*?)\)", value or ""))
    assert "@import" not in page.texts["style"] and "url(" not in page.texts["style"]
    assert not page.named("link") and not page.named("iframe") and not page.named("img")


@pytest.mark.parametrize("name", STUDIES)
def test_nothing_that_a_model_wrote_becomes_markup(written: dict[str, Path], name: str) -> None:
    text = read(written[name], "report.html")
    page = Page(text)
    assert len(page.named("script")) == 1
    assert not any(key.startswith("on") for _, found in page.elements for key in found)
    if STUDIES[name]().questions:
        assert "&lt;script&gt;alert(&#34;x&#34;)" in text
        assert "{{ 7*7 }}" in text  # no template is made of it either


@pytest.mark.parametrize("name", STUDIES)
def test_ids_are_unique_and_links_lead_somewhere(written: dict[str, Path], name: str) -> None:
    page = Page(read(written[name], "report.html"))
    ids = [str(found["id"]) for _, found in page.elements if "id" in found]
    assert len(ids) == len(set(ids))
    for _, found in page.elements:
        for key in ("href", "xlink:href", "aria-labelledby"):
            target = (found.get(key) or "").removeprefix("#")
            assert not target or target.startswith("data:") or target in ids


def test_every_picture_is_in_the_page_and_described(written: dict[str, Path]) -> None:
    page = Page(read(written["grid"], "report.html"))
    names = {path.stem for path in (written["grid"] / "plots").iterdir()}
    described = {str(found["aria-labelledby"]) for found in page.named("svg")}
    assert described == {f"caption-{name}" for name in names}
    assert all(found["role"] == "img" for found in page.named("svg"))


def test_a_study_of_which_everything_failed(written: dict[str, Path]) -> None:
    for file in ("experiment_table.md", "report.html"):
        text = read(written["failed"], file)
        assert "all of them failed" in text
        assert "the loss is not finite at step 31" in text
    assert list((written["failed"] / "plots").iterdir()) == []


def test_without_even_a_base(tmp_path: Path) -> None:
    study = STUDIES["failed"]()
    write_report(replace(study, trials=study.failed), tmp_path)
    for file in ("experiment_table.md", "report.html"):
        assert "Nothing came to its end." in read(tmp_path, file)


def test_a_single_seed_on_a_single_document(written: dict[str, Path]) -> None:
    row = rows(read(written["tiny"], "experiment_table.md"), "Results")[0]
    test = tiny().trials[0].test
    assert test and row["perplexity [95 %]"] == f"{test.perplexity:.3f}"  # and no interval
    assert row["difference to base [95 %]"] == "-"
    assert "not of other seeds" in " ".join(read(written["tiny"], "experiment_table.md").split())


def test_a_loss_that_is_no_number_is_shown_as_that(written: dict[str, Path]) -> None:
    found = {
        row["method"]: row
        for row in rows(read(written["diverged"], "experiment_table.md"), "Results")
    }
    assert found["dora"]["perplexity [95 %]"] == "nan"
    groups = json.loads(read(written["diverged"], "metrics.json"))["groups"]
    assert {g["label"]: g["perplexity"] for g in groups}["dora"] is None
    assert "they have no finite one: dora" in read(written["diverged"], "report.html")


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    write_report(STUDIES["failed"](), tmp_path)
    write_report(tiny(), tmp_path)
    assert "perplexity.svg" in {path.name for path in (tmp_path / "plots").iterdir()}
    write_report(STUDIES["failed"](), tmp_path)
    assert list((tmp_path / "plots").iterdir()) == []
    assert len(json.loads(read(tmp_path, "metrics.json"))["runs"]) == 3


def test_without_matplotlib_there_are_tables_and_a_note(elsewhere: Elsewhere) -> None:
    assert elsewhere.stderr.count("pip install 'lorikeet[plots]'") == 1
    assert {path.name for path in elsewhere.without.iterdir()} == FILES - {"plots"}
    text = read(elsewhere.without, "report.html")
    assert "matplotlib is not installed" in text and "<svg" not in text
    assert rows(read(elsewhere.without, "experiment_table.md"), "Results")


def test_the_console_table_fits_a_terminal() -> None:
    for name in ("comparison", "grid", "long"):
        screen = io.StringIO()
        Console(file=screen, width=80).print(console_table(STUDIES[name]()))
        lines = screen.getvalue().splitlines()
        assert max(map(cell_len, lines)) <= 80
    screen = io.StringIO()
    Console(file=screen, width=80).print(console_table(comparison()))
    test = estimate(next(g for g in comparison().groups if g.label == "full").tests)
    low, high = test.perplexity_interval or (0, 0)
    assert f"{test.perplexity:.3f} [{low:.3f}, {high:.3f}]" in screen.getvalue()


def test_a_method_is_no_markup_in_the_console() -> None:
    study = comparison(seeds=1)
    trials = [replace(t, method="[red]x[/red]") if t.method == "lora" else t for t in study.trials]
    screen = io.StringIO()
    Console(file=screen, width=200).print(console_table(replace(study, trials=trials)))
    title, *lines = screen.getvalue().splitlines()
    assert "[red]x[/red]" in title
    assert any(line.startswith("│ [red]x[/red]") for line in lines)


def errors_of(study: Study) -> list[str]:
    return [trial.error or "" for trial in study.failed]


def test_every_failure_is_told(written: dict[str, Path]) -> None:
    study = STUDIES["rates"]()
    page: Any = Page(read(written["rates"], "report.html"))
    table = " ".join(read(written["rates"], "experiment_table.md").split())
    assert len(study.failed) == 5 and all(NASTY in error for error in errors_of(study))
    for trial in study.failed:
        assert trial.name in page.texts["h3"]
        assert f"- {trial.name}: the loss is not finite at step 31" in table
