"""What is supervised, token by token, on small and on real tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikeet.data.example import Example
from lorikeet.data.layout import Message, Text, Turns
from lorikeet.data.render import Renderer
from lorikeet.errors import DataError, ModelError

Make = Callable[..., Any]
REAL = (
    "models/stories260k",
    "shapes/smollm-135m",
    "shapes/smollm2-135m-instruct",
    "shapes/tinyllama-1.1b-chat",
    "shapes/llama-3.1-8b",
)
NASTY = [
    "plain",
    " leading and trailing \n",
    "\n\nnewlines first",
    "🎉 emoji 👩‍👩‍👧 and flags 🇫🇷",
    "日本語のテキスト",
    "caf\u00e9 cafe\u0301 \u2028 \u00a0 x",
    "line\r\nline\r\n\r\nend",
    "    indented code\n\treturn 1",
    "s",
    "/",
    "{{ messages }} {% raw %}",
    "<|im_end|> and </s> inside",
    "Response: Instruction: ### Response:",
    "a" * 300,
    "x\x00y",
]


def turns(*contents: str, system: str | None = None) -> Turns:
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for i, content in enumerate(contents):
        messages.append({"role": "assistant" if i % 2 else "user", "content": content})
    return Turns(tuple(messages))


def text_of(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def stretches(tokenizer: Any, example: Example) -> list[str]:
    """The texts of the supervised stretches, found by a plain loop."""
    result: list[list[int]] = []
    inside = False
    for token, counts in zip(example.ids, example.supervised, strict=True):
        if counts and not inside:
            result.append([])
        if counts:
            result[-1].append(token)
        inside = counts
    return [text_of(tokenizer, ids) for ids in result]


def render(tokenizer: Any, row: Turns | Text, **options: Any) -> Example:
    examples = Renderer(tokenizer, **options).example(row, origin="t:1")
    assert len(examples) == 1
    return examples[0]


# --- one turn ------------------------------------------------------------------------------------


def test_instruction_response(tiny: Any) -> None:
    example = render(tiny, turns("What?", "Paris."))
    assert text_of(tiny, example.ids) == "Instruction: What?\nResponse: Paris.</s>"
    assert stretches(tiny, example) == [" Paris.</s>"]
    assert example.text_bytes == len(" Paris.")
    assert (example.origin, example.truncated) == ("t:1", False)


def test_instruction_with_context(tiny: Any, make_tokenizer: Make, chatml: str) -> None:
    user = {"role": "user", "content": "q\n\nm", "instruction": "q", "input": "m"}
    row = Turns(({**user, "input_name": "Context"}, {"role": "assistant", "content": "a"}))
    plain = render(tiny, row, template="instruction-response")
    assert text_of(tiny, plain.ids) == "Instruction: q\nContext: m\nResponse: a</s>"
    alpaca = render(tiny, row, template="alpaca")
    assert text_of(tiny, alpaca.ids) == (
        "Below is an instruction that describes a task, paired with an input that provides further"
        " context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nq\n\n### Input:\nm\n\n### Response:\na</s>"
    )
    assert stretches(tiny, alpaca) == ["a</s>"]
    chat = render(make_tokenizer(chat_template=chatml), row)
    assert "<|im_start|>user\nq\n\nm<|im_end|>" in text_of(tiny, chat.ids)


def test_alpaca_without_input_and_with_a_system_message(tiny: Any) -> None:
    first = text_of(tiny, render(tiny, turns("q", "a"), template="alpaca").ids)
    assert first == (
        "Below is an instruction that describes a task. Write a response that appropriately"
        " completes the request.\n\n### Instruction:\nq\n\n### Response:\na</s>"
    )
    second = text_of(tiny, render(tiny, turns("q", "a", system="Be brief."), template="alpaca").ids)
    assert second == "Be brief.\n\n### Instruction:\nq\n\n### Response:\na</s>"


def test_chat_supervises_the_end_of_turn_and_drops_what_follows(tiny_chat: Any) -> None:
    assert tiny_chat.pad_token == tiny_chat.eos_token  # the case in which others mask the end
    example = render(tiny_chat, turns("Hi", "Hello"))
    assert stretches(tiny_chat, example) == ["Hello<|im_end|>"]
    assert example.ids[-1] == tiny_chat.eos_token_id
    assert example.text_bytes == 5


def test_eos_is_appended_only_if_the_template_ends_without_a_control_token(
    make_tokenizer: Make, chatml: str
) -> None:
    without = make_tokenizer(
        chat_template="{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    assert stretches(without, render(without, turns("q", "a", "r", "b"))) == [" a", " b</s>"]
    other = make_tokenizer(chat_template=chatml, eos="</s>")
    assert stretches(other, render(other, turns("q", "a"))) == ["a<|im_end|>"]


def test_a_tokenizer_without_eos(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(eos=None)
    example = render(tokenizer, turns("q", "Paris"))
    assert stretches(tokenizer, example) == [" Paris"]
    rendered = Renderer(tokenizer).render([turns("q", "Paris")], ["t"])[0][0]
    assert not rendered.stops


# --- several turns -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("supervise", "expected"),
    [("all", ["A1<|im_end|>", "A2<|im_end|>"]), ("last", ["A2<|im_end|>"])],
)
def test_multi_turn(tiny_chat: Any, supervise: str, expected: list[str]) -> None:
    row = turns("A1", "A1", "A2", "A2", system="A1")
    example = render(tiny_chat, row, supervise=supervise)
    assert stretches(tiny_chat, example) == expected


def test_everything_is_every_token_but_the_first(tiny_chat: Any) -> None:
    example = render(tiny_chat, turns("q", "a"), supervise="everything")
    assert example.supervised == (False, *[True] * (len(example.ids) - 1))
    # "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>" without control tokens
    assert example.text_bytes == len("user\nq\nassistant\na")


def test_multi_turn_of_a_plain_template(tiny: Any) -> None:
    example = render(tiny, turns("q", "a", "r", "b", system="Sys"))
    assert text_of(tiny, example.ids) == (
        "Sys\n\nInstruction: q\nResponse: a</s>\n\nInstruction: r\nResponse: b</s>"
    )
    assert stretches(tiny, example) == [" a</s>", " b</s>"]


def test_context_and_trailing_turns_are_not_supervised(tiny_chat: Any) -> None:
    row = turns("q", "shown", "r", "learnt", "trailing")
    example = render(tiny_chat, Turns(row.messages, context=3))
    assert stretches(tiny_chat, example) == ["learnt<|im_end|>"]
    assert "trailing" not in text_of(tiny_chat, example.ids)


FORGETS = (  # earlier answers lose their <think> part, as Qwen's and DeepSeek's templates do
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns(tiny_chat: Any, tmp_path: Path) -> None:
    path = tmp_path / "forgets.jinja"
    path.write_text(FORGETS)
    renderer = Renderer(tiny_chat, template=str(path))
    row = turns("A1", "A1", "A2", "why</think>A2")
    rendered = renderer.render([row], ["t:1"])[0][0]
    assert stretches(tiny_chat, rendered.example) == ["A1<|im_end|>", "why</think>A2<|im_end|>"]
    assert not rendered.rewritten

    row = turns("q", "why</think>A1", "r", "A2")
    with pytest.raises(DataError, match="t:1: the template rewrites the turn 'why</think>A1'"):
        renderer.example(row, origin="t:1")
    last = Renderer(tiny_chat, template=str(path), supervise="last")
    assert stretches(tiny_chat, last.example(row, origin="t:1")[0]) == ["A2<|im_end|>"]


MARKS_LAST = (  # the last turn is marked, so that no shorter rendering is a prefix of a longer one
    "{% for m in messages %}{{ ('[LAST]' if loop.last else '') + m.role + ': ' + m.content"
    " + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def test_turns_found_by_their_content(tiny_chat: Any, tmp_path: Path) -> None:
    path = tmp_path / "marks.jinja"
    path.write_text(MARKS_LAST)
    renderer = Renderer(tiny_chat, template=str(path))
    rendered = renderer.render([turns("same", "same", "same", "same")], ["t:1"])[0][0]
    assert rendered.rewritten
    assert stretches(tiny_chat, rendered.example) == ["same<|im_end|>", "same<|im_end|>"]
    text = text_of(tiny_chat, rendered.example.ids)
    assert text.endswith("user: same<|im_end|>[LAST]assistant: same<|im_end|>")


@pytest.mark.parametrize("answer", ["a", "user", " s"])
def test_contents_that_the_markup_has_too(tiny_chat: Any, tmp_path: Path, answer: str) -> None:
    """A search would find these in `assistant: ` or `user: ` before it comes to the answer."""
    path = tmp_path / "marks.jinja"
    path.write_text(MARKS_LAST)
    renderer = Renderer(tiny_chat, template=str(path))
    rendered = renderer.render([turns("u", answer, "u", answer)], ["t:1"])[0][0]
    assert rendered.rewritten
    assert stretches(tiny_chat, rendered.example) == [f"{answer}<|im_end|>"] * 2
    text = text_of(tiny_chat, rendered.example.ids)
    assert text.endswith(f"user: u<|im_end|>[LAST]assistant: {answer}<|im_end|>")


def test_a_template_that_hides_the_answers(tiny_chat: Any, tmp_path: Path) -> None:
    path = tmp_path / "constant.jinja"
    path.write_text("Hello")
    renderer = Renderer(tiny_chat, template=str(path))
    with pytest.raises(DataError, match="t:1: the template does not show the turn 'A1'"):
        renderer.example(turns("q", "A1"), origin="t:1")


def test_a_template_that_changes_the_content(tiny_chat: Any, tmp_path: Path, chatml: str) -> None:
    path = tmp_path / "upper.jinja"
    path.write_text(chatml.replace("m.content", "m.content | upper"))
    example = render(tiny_chat, turns("hi", "hello"), template=str(path))
    assert stretches(tiny_chat, example) == ["HELLO<|im_end|>"]


# --- BOS -----------------------------------------------------------------------------------------


def test_bos_once_where_the_tokenizer_adds_it(
    tiny_bos: Any, tiny: Any, tmp_path: Path, chatml: str
) -> None:
    bos = tiny_bos.bos_token_id
    assert render(tiny_bos, turns("q", "a")).ids[:2].count(bos) == 1
    assert render(tiny_bos, Text("once")).ids.count(bos) == 1
    assert render(tiny, Text("once")).ids.count(bos) == 0
    path = tmp_path / "bos.jinja"
    path.write_text("{{ bos_token }}" + chatml)
    assert render(tiny_bos, turns("q", "a"), template=str(path)).ids.count(bos) == 1
    path.write_text(chatml)
    assert render(tiny_bos, turns("q", "a"), template=str(path)).ids.count(bos) == 1


@pytest.mark.parametrize("begin", ["", "{{ bos_token }}"])
def test_the_tokenizers_own_template_alone_decides_about_bos(
    begin: str, make_tokenizer: Make, chatml: str
) -> None:
    tokenizer = make_tokenizer(bos=True, chat_template=begin + chatml)
    row = turns("q", "a")
    example = render(tokenizer, row)
    expected = tokenizer.apply_chat_template(list(row.messages), tokenize=True, return_dict=False)
    assert list(example.ids) == expected[: len(example.ids)]
    assert example.ids.count(tokenizer.bos_token_id) == (1 if begin else 0)


# --- documents -----------------------------------------------------------------------------------


def test_a_document(tiny: Any) -> None:
    example = render(tiny, Text(" Once 🎉"))
    assert text_of(tiny, example.ids) == " Once 🎉</s>"
    assert example.supervised == (False, *[True] * (len(example.ids) - 1))
    assert example.text_bytes == len(" Once 🎉".encode()) - len(text_of(tiny, example.ids[:1]))


@pytest.mark.parametrize("bos", [False, True])
@settings(max_examples=40, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80),
    max_length=st.integers(8, 20),
)
def test_windows_supervise_every_token_once(
    bos: bool, text: str, max_length: int, make_tokenizer: Make
) -> None:
    tokenizer = make_tokenizer(bos=bos)
    whole = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    rendered = Renderer(tokenizer, max_length=max_length).render([Text(text)], ["t"])[0]
    supervised = [token for one in rendered for token in one.example.ids[1:]]
    assert supervised == whole[1:]
    for one in rendered:
        assert len(one.example.ids) <= max_length
        assert one.example.supervised == (False, *[True] * (len(one.example.ids) - 1))
        assert not bos or one.example.ids[0] == tokenizer.bos_token_id
    assert "".join(one.row.text for one in rendered) == text
    assert [one.stops for one in rendered] == [False] * (len(rendered) - 1) + [True]
    unpredicted = 0 if bos else len(text_of_first_token(tokenizer, text).encode())
    assert sum(one.example.text_bytes for one in rendered) == len(text.encode()) - unpredicted


def text_of_first_token(tokenizer: Any, text: str) -> str:
    """The characters of which the first token holds a part."""
    _, end = tokenizer(text, return_offsets_mapping=True)["offset_mapping"][0]
    return text[:end]


# --- length and bytes ----------------------------------------------------------------------------


def test_truncation_cuts_the_end(tiny: Any) -> None:
    row = turns("What?", "Paris is the capital of France. " * 5)
    whole = render(tiny, row)
    prompt = len(whole.ids) - whole.supervised_tokens
    cut = render(tiny, row, max_length=prompt + 3)
    assert cut.ids == whole.ids[: prompt + 3]
    assert (cut.truncated, cut.supervised_tokens, whole.truncated) == (True, 3, False)
    assert cut.text_bytes == len(text_of(tiny, cut.ids[prompt:]))
    nothing = Renderer(tiny, max_length=prompt).render([row], ["t"])[0][0]
    assert nothing.example.supervised_tokens == nothing.example.text_bytes == 0
    assert nothing.needed_length == prompt + 1
    assert not nothing.stops


def test_a_character_of_several_tokens_counts_once(tiny: Any) -> None:
    row = turns("q", "🎉🎉é")
    whole = render(tiny, row)
    assert whole.supervised_tokens > 8  # bytes, without merges for these
    assert whole.text_bytes == len(" 🎉🎉é".encode())
    prompt = len(whole.ids) - whole.supervised_tokens
    counts = [
        render(tiny, row, max_length=prompt + n).text_bytes
        for n in range(1, len(whole.ids) - prompt)
    ]
    assert counts == [1, 5, 5, 5, 5, 9, 9, 9, 9, 11, 11]


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["instruction-response", "alpaca", "chat"])
@pytest.mark.parametrize("response", NASTY)
def test_small_tokenizers_prompt_is_a_prefix(
    template: str, response: str, make_tokenizer: Make, chatml: str
) -> None:
    for bos in (False, True):
        tokenizer = make_tokenizer(bos=bos, chat_template=chatml, eos="<|im_end|>")
        check_prompt(tokenizer, template, turns("Hi " + response, response), max_length=2000)


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(real: Callable[[str], Any], name: str) -> None:
    tokenizer = real(name)
    templates = ["instruction-response", "alpaca"] + ["chat"] * bool(tokenizer.chat_template)
    for template in templates:
        for user, response in zip(NASTY, reversed(NASTY), strict=True):
            check_prompt(tokenizer, template, turns(user, response), max_length=2000)
            check_prompt(tokenizer, template, turns(user, response, "r", user), max_length=2000)


def check_prompt(tokenizer: Any, template: str, row: Turns, *, max_length: int) -> None:
    """The prompt is a prefix, the mask begins behind it, and the response can be read in it."""
    renderer = Renderer(tokenizer, template=template, max_length=max_length, supervise="last")
    rendered = renderer.render([row], ["t"])[0][0]
    example = rendered.example
    prompt = renderer.prompt(row.prompt)
    assert renderer.prompt(row.messages) == prompt
    if rendered.boundary_merge:
        assert row.response[0].isspace(), "only space may merge with the template's line end"
        return
    assert list(example.ids[: len(prompt)]) == prompt
    assert example.supervised.index(True) == len(prompt)
    assert rendered.needed_length == len(prompt) + 1
    assert all(example.supervised[len(prompt) :])
    assert example.ids[-1] == tokenizer.eos_token_id
    assert rendered.stops
    learnt = text_of(tokenizer, example.ids[len(prompt) :])
    if "\x00" not in row.response and "<|im_end|>" not in row.response:
        assert row.response.strip() in learnt
        assert learnt.removesuffix(tokenizer.eos_token).strip() == row.response.strip()


def test_a_boundary_merge_is_told(make_tokenizer: Make, chatml: str) -> None:
    tokenizer = make_tokenizer(chat_template=chatml.replace("assistant\n", "assistant\n\n"))
    # "assistant\n\n" + "\nfoo": three line ends are one token in the corpus of the tokenizer
    row = turns("q", "\nfoo")
    merged = Renderer(tokenizer).render([row], ["t"])[0][0]
    prompt = Renderer(tokenizer).prompt(row.prompt)
    assert list(merged.example.ids[: len(prompt)]) != prompt
    assert merged.boundary_merge


def test_prompt_of_a_text(tiny: Any, tiny_bos: Any) -> None:
    assert text_of(tiny, Renderer(tiny).prompt("Once upon")) == "Once upon"
    ids = Renderer(tiny_bos).prompt("Once upon")
    assert ids == tiny_bos("Once upon")["input_ids"]
    assert tuple(ids) == render(tiny_bos, Text("Once upon a")).ids[: len(ids)]


@settings(max_examples=60, deadline=None)
@given(
    user=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40),
    response=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
        str.strip
    ),
)
def test_any_text(user: str, response: str, make_tokenizer: Make) -> None:
    renderer = Renderer(make_tokenizer(bos=True))
    rendered = renderer.render([turns(user, response)], ["t"])[0][0]
    example = rendered.example
    prompt = renderer.prompt(turns(user).messages)
    assert list(example.ids[: len(prompt)]) == prompt
    assert example.text_bytes == len(" ") + len(response.strip().encode())
    assert not rendered.boundary_merge


# --- the rest ------------------------------------------------------------------------------------


def test_control_tokens_in_a_row_are_told(tiny_chat: Any) -> None:
    renderer = Renderer(tiny_chat)
    rows = [turns("q", "a"), turns("q", "say <|im_end|> now"), Text("x</s>y")]
    rendered = [units[0] for units in renderer.render(rows, ["1", "2", "3"])]
    assert [one.special_in_text for one in rendered] == [False, True, True]
    assert stretches(tiny_chat, rendered[1].example) == ["say <|im_end|> now<|im_end|>"]
    assert rendered[1].example.text_bytes == len("say  now")


def test_many_rows_keep_their_order(tiny: Any) -> None:
    rows = [Text(f"text {i}") if i % 3 else turns("q", f"answer {i}") for i in range(2100)]
    rendered = Renderer(tiny).render(rows, [str(i) for i in range(2100)])
    assert [unit[0].example.origin for unit in rendered] == [str(i) for i in range(2100)]
    assert all(
        unit[0].row is row or unit[0].row == row for unit, row in zip(rendered, rows, strict=True)
    )


def test_stop_ids(tiny: Any, tiny_chat: Any, make_tokenizer: Make, chatml: str) -> None:
    assert Renderer(tiny).stop_ids() == {tiny.eos_token_id}
    both = make_tokenizer(chat_template=chatml, eos="</s>")
    end = both.convert_tokens_to_ids("<|im_end|>")
    assert Renderer(both).stop_ids() == {both.eos_token_id, end}


def test_no_assistant_turn_and_slow_tokenizers(tiny: Any) -> None:
    with pytest.raises(DataError, match="t:9: no assistant turn"):
        Renderer(tiny).example(turns("q"), origin="t:9")
    with pytest.raises(ValueError, match="expected all, last, everything"):
        Renderer(tiny, supervise="first")

    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="Slow is a slow tokenizer"):
        Renderer(Slow())  # type: ignore[arg-type]
