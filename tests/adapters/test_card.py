"""The model card: what the hub reads in it, what it must not say, and that its snippets run."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from lorikeet import starter
from lorikeet.adapters import read_adapter_config, save_adapter
from lorikeet.adapters.card import Outcome, card, is_hub_id
from lorikeet.adapters.schema import AdapterInfo
from lorikeet.config import LoraConfig
from lorikeet.lora import inject, lora_parameters
from lorikeet.model import load_model

PROVENANCE: dict[str, Any] = {
    "versions": {"lorikeet": "0.1.0", "torch": "2.13.0"},
    "base_fingerprint": "f" * 64,
    "template": "chat",
    "data_sha256": "d" * 64,
    "seed": 7,
}
SCORE = {"documents": 40, "tokens": 1234, "nll": 1.5, "nll_stderr": 0.02, "perplexity": 4.4817}
OUTCOME = Outcome(
    steps=1200,
    learning_rate=2e-4,
    batch_size=8,
    rows=400,
    base=SCORE,
    tuned={**SCORE, "nll": 1.0, "nll_stderr": 0.01, "perplexity": 2.7183},
    difference={"nll": -0.5, "nll_stderr": 0.015, "interval95": (-0.5294, -0.4706)},
)


def info(base_model: str = "org/base", **options: Any) -> AdapterInfo:
    given = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"], **options}
    return AdapterInfo(LoraConfig(**given), base_model, PROVENANCE)


def front_matter(text: str) -> dict[str, Any]:
    _, matter, _ = text.split("---\n", 2)
    found = yaml.safe_load(matter)
    assert ModelCard(text).data.to_dict() == found, "the hub reads another front matter"
    return found


def shown(text: str) -> str:
    """What a reader sees of the Markdown, as HTML."""
    return MarkdownIt("commonmark").enable("table").render(text.split("---\n", 2)[2])


def test_the_hub_reads_the_front_matter() -> None:
    assert front_matter(card(info(), outcome=OUTCOME)) == {
        "base_model": "org/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "unknown",
        "tags": ["lora", "lorikeet"],
    }
    assert front_matter(card(info(), license="apache-2.0"))["license"] == "apache-2.0"


@pytest.mark.parametrize("tricky", ["on", "null", "1.0", "no: [", "a\n---\nb"])
def test_a_license_stays_the_text_that_it_is(tricky: str) -> None:
    matter = yaml.safe_load(
        re.match(r"---\n(.*?)\n---\n\n#", card(info(), license=tricky), re.S)[1]
    )  # type: ignore[index]
    assert matter["license"] == tricky
    assert set(matter) == {"base_model", "library_name", "pipeline_tag", "license", "tags"}


def test_settings_and_figures_are_the_runs_own() -> None:
    text = card(info(dropout=0.05, rank_pattern={"v_proj": 2}), outcome=OUTCOME)
    for line in (
        "- rank: 4",
        "- alpha: 8",
        "- rank by module: `v_proj = 2`",
        "- targets: `q_proj`, `v_proj`",
        "- dropout: 0.05",
        "- steps: 1,200",
        "- learning rate (peak): 0.0002",
        "- batch size (examples per step): 8",
        "- trained on: 400 rows",
        f"- data sha256: `{'d' * 64}`",
        "- seed: `7`",
        # The error of a perplexity is 4.4817 * 0.02 and 2.7183 * 0.01.
        "| base | 4.482 | 0.090 | 1.5000 | 0.0200 |",
        "| with the adapter | 2.718 | 0.027 | 1.0000 | 0.0100 |",
        "`lorikeet 0.1.0`, `torch 2.13.0`",
    ):
        assert line in text.splitlines()
    assert "-0.5000 nats/token (below zero is better), 95 % interval [-0.5294, -0.4706]" in text
    assert "On 40 held-out examples, 1,234 supervised tokens:" in text


def test_what_was_not_measured_is_not_there() -> None:
    text = card(info())
    assert "Nothing was measured" in text
    assert "perplexity" not in text
    assert "steps" not in text
    single = {**SCORE, "nll_stderr": None}
    lonely = card(
        info(), outcome=Outcome(base=single, tuned={**single, "perplexity": float("inf")})
    )
    assert "| base | 4.482 | n/a | 1.5000 | n/a |" in lonely
    assert "| with the adapter | inf | n/a | 1.5000 | n/a |" in lonely
    assert "Standard errors" not in lonely


def test_paths_of_this_machine_stay_out(tmp_path: Path) -> None:
    secret = tmp_path / "alice" / "base"
    made_by = {**PROVENANCE, "template": str(tmp_path / "alice" / "mine.jinja")}
    text = card(AdapterInfo(LoraConfig(), str(secret), made_by), outcome=OUTCOME)
    assert "alice" not in text
    assert "a local model, `base`" in text
    assert "- template: `mine.jinja`" in text
    assert "base_model" not in front_matter(text)
    assert 'from_pretrained("BASE_MODEL")' in text


def test_what_is_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_hub_id("HuggingFaceTB/SmolLM2-135M")
    for other in ("", "gpt2", "/models/a", "./a/b", "a/b/c", "a\\b", "a/b\nc: d", "a/..", '"/x"'):
        assert not is_hub_id(other)
    monkeypatch.chdir(tmp_path)
    Path("models/mine").mkdir(parents=True)
    assert not is_hub_id("models/mine")


@pytest.mark.parametrize(
    "hostile",
    [
        "`code` <img src=x onerror=alert(1)>",
        "``` \n```\n# heading",
        "| cell | <script>alert(1)</script>",
        "[click](javascript:alert(1))",
        "a\n---\nlicense: mit\n---\nb",
        "\x1b[31mred\x07 *bold* __b__",
        "x" * 10_000,
    ],
)
def test_values_of_a_file_from_anywhere_are_only_text(hostile: str) -> None:
    made_by = {
        **PROVENANCE,
        "template": hostile,
        "data_sha256": hostile,
        "versions": {"v": hostile},
    }
    lora = LoraConfig(target_modules=[hostile.replace(",", "")])
    text = card(AdapterInfo(lora, hostile, made_by), outcome=OUTCOME)
    assert front_matter(text)["license"] == "unknown"
    assert "base_model" not in front_matter(text)
    seen = shown(text)
    plain = shown(card(AdapterInfo(LoraConfig(target_modules=["q"]), "x", PROVENANCE)))
    tags = set(re.findall(r"<(\w+)", seen))
    assert tags <= set(re.findall(r"<(\w+)", plain)) | {"table", "thead", "tbody", "tr", "th", "td"}
    assert re.findall(r"<h\d>.*?</h\d>", seen) == re.findall(r"<h\d>.*?</h\d>", plain)
    assert "\x1b" not in text
    assert len(text) < 4000


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of the embedded model that changes what it says."""
    base = load_model(starter.folder(), dtype="fp32")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    inject(base.model, config, seed=0)
    for parameter in lora_parameters(base.model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    made_by = {**PROVENANCE, "base_fingerprint": base.fingerprint}
    save_adapter(
        base.model, tmp_path / "adapter", config=config, base_model=base.path, provenance=made_by
    )
    return tmp_path / "adapter"


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is dep:FutureWarning",
    r"ignore:Unexpected keyword arguments \['lorikeet'\] for class LoraConfig:UserWarning",
)
def test_the_snippets_run(adapter: Path) -> None:
    text = card(read_adapter_config(adapter), outcome=OUTCOME)
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    spaces = []
    for code in snippets:
        code = code.replace('"BASE_MODEL"', json.dumps(str(starter.folder())))
        code = code.replace('"ADAPTER"', json.dumps(str(adapter)))
        said = io.StringIO()
        names: dict[str, Any] = {}
        with contextlib.redirect_stdout(said):
            exec(compile(code, "README.md", "exec"), names)
        assert said.getvalue().strip()
        spaces.append(names)
    with_peft, with_lorikeet = spaces
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = with_peft["model"](input_ids=ids).logits.float()
        found = with_lorikeet["base"].model(input_ids=ids).logits.float()
        with with_peft["model"].disable_adapter():
            plain = with_peft["model"](input_ids=ids).logits.float()
    assert (found - expected).abs().max() < 0.05 * (plain - expected).abs().max()
