"""Modelfiles: the Go template says what the chat template says, or the translation is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from go_templates import execute, parse

import lorikeet.starter
from lorikeet.data import Renderer
from lorikeet.errors import ModelError
from lorikeet.export.modelfile import Modelfile, modelfile
from lorikeet.model.base import load_tokenizer

CHATML = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
DEFAULT = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are kind.\\nAnd "brief".<|im_end|>\\n' -}}
{%- endif -%}
"""
LLAMA3 = """\
{%- for m in messages -%}
{%- if loop.first -%}{{- bos_token -}}{%- endif -%}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' -}}
{{- m['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
LLAMA31 = """\
{{- bos_token -}}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday is a day.\\n\\n' -}}
{%- if messages[0]['role'] == 'system' -%}
{{- messages[0]['content'] -}}{%- set messages = messages[1:] -%}
{%- endif -%}
{{- '<|eot_id|>' -}}
{%- for m in messages -%}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' -}}
{{- m['content'] + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
LLAMA2 = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}
{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}
{{- bos_token + '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' -}}
{%- else -%}{{- ' ' + m['content'] + ' ' + eos_token -}}{%- endif -%}
{%- endfor -%}
"""
MISTRAL = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] + '\\n\\n' -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
{{- bos_token -}}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}
{{- '[INST] ' + (system if loop.last else '') + m['content'] + '[/INST]' -}}
{%- else -%}{{- ' ' + m['content'] + eos_token -}}{%- endif -%}
{%- endfor -%}
"""
GEMMA = """\
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}{{- raise_exception('no system role') -}}{%- endif -%}
{%- for m in messages -%}
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}
{{- '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
GEMMA3 = """\
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] + '\\n\\n' -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
{%- for m in messages -%}
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}
{{- '<start_of_turn>' + role + '\\n' + (system if loop.first else '') -}}
{{- m['content'] + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
PHI3 = """\
{%- for m in messages -%}
{{- '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' -}}
{%- endfor -%}
{{- '<|assistant|>\\n' if add_generation_prompt else eos_token -}}
"""
BRACES = """\
{%- for m in messages -%}{{- '{{' + m['role'] + '}} {' + m['content'] + '{\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '{{assistant}} {' -}}{%- endif -%}
"""
TEMPLATES = {
    "chatml": CHATML,
    "chatml, default": DEFAULT + CHATML,
    "llama 3": LLAMA3,
    "llama 3.1": LLAMA31,
    "llama 2": LLAMA2,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "gemma 3": GEMMA3,
    "phi-3": PHI3,
    "braces": BRACES,
    "instruction-response": "",
    "alpaca": "",
}

CONVERSATIONS = [
    "u",
    "uau",
    "uauau",
    "su",
    "suau",
    "suauauau",
]
WORDS = ["Hi!", "A {{ brace }} and\na line.", "“é”", "{% if %}", "4 < 5 & \\n", "x" * 9, "y", "z"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(Path(lorikeet.starter.__file__).parent / "model")


@pytest.fixture
def renderer(tokenizer: Any, tmp_path: Path) -> Callable[[str], Renderer]:
    def make(name: str) -> Renderer:
        if not (text := TEMPLATES.get(name, name)):
            return Renderer(tokenizer, template=name)
        (tmp_path / "chat.jinja").write_text(text, encoding="utf-8")
        return Renderer(tokenizer, template=str(tmp_path / "chat.jinja"))

    return make


def conversation(roles: str) -> list[dict[str, str]]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    pairs = zip(roles, WORDS, strict=False)
    return [{"role": names[role], "content": word} for role, word in pairs]


def system_of(made: Modelfile) -> str:
    """The value of SYSTEM."""
    rest = made.text.partition("\nSYSTEM ")[2]
    quotes = '"""' if rest.startswith('"""') else '"'
    return rest.removeprefix(quotes).partition(quotes)[0] if rest else ""


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_go_template_says_what_the_chat_template_says(
    name: str, adds_bos: bool, renderer: Callable[[str], Renderer]
) -> None:
    own = renderer(name)
    made = modelfile("m.gguf", own, adds_bos=adds_bos)
    tried = 0
    for roles in CONVERSATIONS:
        if name == "gemma" and roles.startswith("s"):
            continue
        turns = conversation(roles)
        (expected,) = own.template.render(
            own.tokenizer, [turns], origins=["test"], add_generation_prompt=True
        )
        found = execute(made.template, turns, system=system_of(made))
        assert found == (expected.removeprefix("<|im_start|>") if bos(name, adds_bos) else expected)
        tried += 1
    assert tried >= 3


def bos(name: str, adds_bos: bool) -> bool:
    """Whether a BOS is left out: the starter's is <|im_start|>, which ChatML begins with, too."""
    return adds_bos and name not in ("phi-3", "braces", "instruction-response", "alpaca")


def test_a_last_answer_stays_open(renderer: Callable[[str], Renderer]) -> None:
    template = modelfile("m.gguf", renderer(CHATML), adds_bos=False).template
    found = execute(template, conversation("ua"))
    assert found.endswith(f"<|im_start|>assistant\n{WORDS[1]}")


def test_system_messages_in_the_middle(renderer: Callable[[str], Renderer]) -> None:
    template = modelfile("m.gguf", renderer(CHATML), adds_bos=False).template
    found = execute(template, conversation("usau"))
    assert found.count("<|im_start|>system") == 1
    assert found.index("<|im_start|>system") > found.index("<|im_start|>user")


def test_what_stands_in_a_modelfile(renderer: Callable[[str], Renderer]) -> None:
    generation = {
        "temperature": 0.6,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "max_new_tokens": 64,
        "do_sample": True,
        "eos_token_id": [0, 2],
    }
    made = modelfile(
        "my model.gguf", renderer("chatml, default"), adds_bos=False, generation=generation
    )
    lines = made.text.splitlines()
    assert lines[0] == "FROM ./my model.gguf"
    assert lines[1].startswith('TEMPLATE """{{')
    assert system_of(made) == 'You are kind.\nAnd "brief".'
    assert lines[-6:] == [
        'PARAMETER stop "<|endoftext|>"',
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 0.9",
        "PARAMETER repeat_penalty 1.1",
        "PARAMETER num_predict 64",
    ]
    greedy = modelfile("m.gguf", renderer(CHATML), adds_bos=False, generation={"do_sample": False})
    assert greedy.text.endswith("\nPARAMETER temperature 0\n")
    plain = modelfile("m.gguf", renderer(CHATML), adds_bos=False)
    assert plain.text.endswith('\nPARAMETER stop "<|im_end|>"\n')


def test_what_ollama_does_not_do_is_noted(renderer: Callable[[str], Renderer]) -> None:
    assert modelfile("m.gguf", renderer(CHATML), adds_bos=False).notes == ()
    notes = modelfile("m.gguf", renderer("gemma"), adds_bos=False).notes
    assert notes[0].startswith("the chat template has no place for a system message")
    assert notes[1].startswith("spaces around messages (user, assistant)")
    dated = "{{- strftime_now('%Y') + '\\n' -}}" + CHATML
    assert "today's" in modelfile("m.gguf", renderer(dated), adds_bos=False).notes[0]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML.replace("m['role'] +", "m['role'] + loop.index|string +"), "one turn as it writes"),
        (CHATML.replace("m['content']", "m['content'] | upper"), "one turn as it writes"),
        (CHATML.replace("m['content']", "m['content'] | replace('?', '!')"), "after '"),
        ("{{- raise_exception('tools only') -}}", "renders no plain conversation"),
        (CHATML.replace("<|im_end|>", '\\"\\"\\"'), "no way to spell quotation marks"),
    ],
)
def test_templates_that_do_more_are_refused(
    template: str, reason: str, renderer: Callable[[str], Renderer]
) -> None:
    with pytest.raises(ModelError, match=reason):
        modelfile("m.gguf", renderer(template), adds_bos=False)


def test_a_file_name_with_line_breaks(renderer: Callable[[str], Renderer]) -> None:
    with pytest.raises(ModelError, match="line breaks"):
        modelfile("a\nSYSTEM x", renderer(CHATML), adds_bos=False)


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "tinyllama-1.1b-chat"])
def test_templates_of_known_models(name: str, shared: Callable[[str], Path]) -> None:
    own = Renderer(load_tokenizer(shared(f"shapes/{name}")))
    made = modelfile("m.gguf", own, adds_bos=name.startswith("tiny"))
    for roles in CONVERSATIONS:
        turns = conversation(roles)
        expected = own.template.render(
            own.tokenizer, [turns], origins=["test"], add_generation_prompt=True
        )
        assert [execute(made.template, turns, system=system_of(made))] == expected


def test_the_evaluator_knows_go() -> None:
    """Its own behaviour, as Go 1.19 gave it."""
    turns = conversation("su")
    assert execute("a {{- .System -}}  b", turns) == f"a{WORDS[0]}b"
    assert execute("a {{ .System }}  b", turns) == f"a {WORDS[0]}  b"
    looped = "{{ range $i, $_ := .Messages }}{{ if eq $i 0 }}x{{ else if ne .Role $.System }}y"
    assert execute(looped + "{{ else }}z{{ end }}{{ end }}", turns) == "xy"
    assert execute('{{ $a := true }}{{ if and $a .System }}{{ "{{" }}{{ end }}', turns) == "{{"
    counted = "{{ range $i, $_ := .Messages }}{{ len (slice $.Messages $i) }}{{ end }}"
    assert execute(counted, turns) == "21"
    assert json.dumps([node.text for node in parse("x {{- end2 }}")]) == '["x", null, ""]'
