"""What reports say in words: the command that does it again, names without their places."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace

import pytest
import yaml
from made_up import CONFIG, STUDIES, comparison

from lorikeet.cli.compare import add_arguments
from lorikeet.study import wording
from lorikeet.study.outcomes import outcomes


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("cannot write /a/b/c/model.bin: full", "cannot write …/model.bin: full"),
        ("/data/rows.jsonl", "…/rows.jsonl"),
        (r"C:\Users\me\rows.jsonl is gone", r"…\rows.jsonl is gone"),
        ("data/rows.jsonl and ~/x/y", "data/rows.jsonl and ~/x/y"),
        ("org/name at 3/4 of 12 km/h", "org/name at 3/4 of 12 km/h"),
        ("a page: https://example.org/a/b", "a page: https://example.org/a/b"),
    ],
)
def test_places_on_a_disk_are_cut(text: str, without: str) -> None:
    assert wording.without_places(text) == without


def test_the_command_for_a_comparison_is_one_that_is_understood() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    program, verb, *arguments = shlex.split(wording.again(comparison()).replace("\\\n", " "))
    assert (program, verb) == ("lorikeet", "compare")
    found = parser.parse_args(arguments)
    assert found.methods == "base,lora,dora,lora-r64,full"
    assert found.seeds == 3 and found.other == "wikitext"
    assert "full=5e-06,2e-05,8e-05" in found.grid and len(found.grid) == 4
    assert "--other none" in wording.again(comparison(other=False))


def test_leads() -> None:
    study = STUDIES["rates"]()
    lead = wording.lead(study, outcomes(study))
    assert lead.startswith("14 runs on SmolLM-135M (134,515,008 parameters)")
    assert "; 5 of them failed. Results are those on 120 held-out documents." in lead
    assert wording.title(study) == "Sweep over learning_rate"
    assert wording.title(comparison()) == "Comparison of base, lora, dora, lora-r64 and full"


def test_options_in_common_leave_out_what_varies() -> None:
    config = {**CONFIG, "train": {**CONFIG["train"], "learning_rate": None, "method": "lora"}}
    common = wording.in_common(replace(comparison(), config=config))
    assert "out" not in common and "learning_rate" not in common["train"]
    grid = wording.in_common(STUDIES["grid"]())
    assert "r" not in grid["lora"] and grid["lora"]["alpha"] == 16.0
    assert yaml.safe_load(wording.as_yaml(grid)) == grid
