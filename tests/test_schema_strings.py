"""Rules of strings, tried as regular expressions on the JSON of texts, and by a model that answers within them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheroute import Llama
from cacheroute.engine import completion, constraints, schema_strings

PATTERNS = [
    *(r"^\d{3}-\w+$", r"^[ -~]{1,4}$", r'^a"b\\c\n$', r"^[^a]{2}$", r"^..?$", r"^(ab|c)*d?$", r"^[]a]$", r"^$", r"^(a|)$"),
    *(
        r"^\S\s\D\W?$",
        r"^[\w.+-]+@[a-z]{2,}\.(?:de|org)$",
        r"^[à-ÿ]{2}$",
        r"^a{0}b{,2}c{2,}$",
        r"^[^\x00-\x7f]$",
        r"^(?P<n>x)+?$",
    ),
    *('^["\\\\\\]]$', r"^a\/b\.c$", r"^([01]\d|2[0-3]):[0-5]\d$", "^😀$", "^[^\\n]$"),
]


def as_regex(rule: str) -> str:
    """A rule of GBNF without references as a regular expression: sets and operators are written alike."""
    parts = re.findall(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|\{[^}]*\}|space|[()|*+?]', rule)
    assert "".join(parts).replace(" ", "") == rule.replace(" ", "")
    return "".join(
        re.escape(ast.literal_eval(p)) if p[0] == '"' else " ?" if p == "space" else "(?:" if p == "(" else p for p in parts
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_rule_matches_what_the_pattern_does(pattern: str) -> None:
    rule = re.compile(as_regex(schema_strings.matching(pattern)))
    matched = 0

    @given(st.from_regex(re.compile(pattern, re.ASCII), fullmatch=True) | st.text('aéb"\\1- \n]@', max_size=4))
    def check(text: str) -> None:
        nonlocal matched
        wanted = re.fullmatch(pattern, text, re.ASCII) is not None
        written = json.dumps(text, ensure_ascii=False)
        control = re.search(r"[\x00-\x07\x0b\x0e-\x1f\x7f]", text)  # have no short form
        if control or (not pattern.isascii() and not wanted):
            return
        found = rule.fullmatch(written) is not None
        assert found == wanted or (not found and re.search(r"[\r\u2028\u2029\v\x85\xa0]", text)), (written, rule.pattern)
        matched += found

    check()
    assert matched


@given(st.lists(st.text('ab"\\é', max_size=3), max_size=6), st.text("abcé", max_size=4))
def test_other_names_are_all_but_those(names: list[str], text: str) -> None:
    rule = as_regex(schema_strings.others(names))
    assert (re.fullmatch(rule, json.dumps(text, ensure_ascii=False)) is None) == (text in names)


@pytest.mark.parametrize(
    ("pattern", "wrong"),
    [
        ("abc", "does not begin with"),
        ("^a|b$", "does not begin with"),
        ("^(?=a)a$", "looks around"),
        (r"^(a)\1$", "reference to a group"),
        (r"^\bfoo$", "within it"),
        ("^a$b$", "within it"),
        ("(?i)^a$", "has flags"),
        ("^[$", "no regular expression"),
        ("^]\\$", "does not begin with"),
        (r"^\p{L}$", "no regular expression"),
        ("^a{3000}$", "more than 2000 times"),
        ("^\0$", "no short form"),
        ("^" + "(" * 5000 + "a" + ")" * 5000 + "$", "no regular expression|within it|nested"),
    ],
    ids=lambda part: part[:20],
)
def test_a_pattern_without_a_rule_is_a_reason(pattern: str, wrong: str) -> None:
    with pytest.raises((ValueError, RecursionError), match=wrong):
        schema_strings.matching(pattern)


@pytest.fixture(scope="module")
def llm(demo_model: Path) -> Iterator[Llama]:
    with closing(Llama(str(demo_model), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)) as llm:
        yield llm


def answers(llm: Llama, schema: object, n: int = 3) -> Iterator[str]:
    own = constraints.of(json_schema=json.dumps(schema))
    prompt = own.ending(completion.chat_prompt(llm, [{"role": "user", "content": "Write a value."}]))
    for seed in range(n):
        run = completion.Completion(llm, prompt, 60, seed, {"temp": 1.5, **own.sampling(llm)})
        list(run.pieces())
        if run.finish_reason == "stop":
            yield run.text


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if "," not in p and "*" not in p and "+" not in p])
def test_an_answer_matches_its_pattern(llm: Llama, pattern: str) -> None:
    found = list(answers(llm, {"type": "string", "pattern": pattern}))
    assert found
    for text in found:
        assert re.fullmatch(pattern, json.loads(text), re.ASCII)


def test_more_properties_have_other_names(llm: Llama) -> None:
    own = {name: {"const": 1} for name in ("a", "ab", 'q"')}
    schema = {
        "properties": own,
        "required": ["ab"],
        "additionalProperties": {"properties": {"ab": {"const": 3}}, "required": ["ab"]},
    }
    grammar = constraints.of(json_schema=json.dumps(schema)).grammar
    assert grammar is not None
    (rule,) = re.findall(r"^additional-kv-name ::= (.*)$", grammar, re.MULTILINE)
    for text, free in (("a", False), ("ab", False), ("abc", True), ("b", True), ("", True)):
        assert bool(re.fullmatch(as_regex(rule), json.dumps(text))) == free
    found = list(answers(llm, schema, 5))
    assert found
    for text in found:
        assert all(value == 1 for name, value in json.loads(text).items() if name in own)
