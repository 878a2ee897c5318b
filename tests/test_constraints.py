"""What an answer may be: grammars, JSON schemas, stop strings and biases, by llama.cpp's names; what is wrong is one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cacheroute import CacherouteError, Llama, UsageError
from cacheroute.engine import completion, constraints
from cacheroute.engine.constraints import Constraints
from faults.runner import Outcome, in_process

pytestmark = pytest.mark.engine

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "large": {"type": "boolean"}},
    "required": ["city", "large"],
}
RUN = ("-p", "What is the capital of France?", "-n", 40, "-c", 256, "-t", 1, "-s", 3, "--no-stdin")


@pytest.fixture(scope="module")
def llm(demo_model: Path) -> Iterator[Llama]:
    with closing(Llama(str(demo_model), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)) as llm:
        yield llm


def answer(llm: Llama, own: Constraints, text: str = "What is the capital of France?", **sampling: Any) -> completion.Completion:
    prompt = own.ending(completion.chat_prompt(llm, [{"role": "user", "content": text}]))
    run = completion.Completion(llm, prompt, 40, 7, dict(temp=0.0) | sampling | own.sampling(llm))
    list(run.pieces())
    return run


# ---- what they do


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_follows_a_schema_and_a_grammar(llm: Llama, temperature: float) -> None:
    found = json.loads(answer(llm, constraints.of(json_schema=json.dumps(SCHEMA)), temp=temperature).text)
    assert found["city"] in ("Paris", "Rome") and isinstance(found["large"], bool) and len(found) == 2
    run = answer(llm, constraints.of(grammar='root ::= "yes" | "no" | "что"'), temp=temperature)
    assert run.text in ("yes", "no", "что") and run.finish_reason == "stop"


def test_a_grammar_samples_as_llama_cpp_does_without_it(llm: Llama) -> None:
    free = answer(llm, Constraints(), temp=1.2)
    llm.reset()
    ruled = answer(llm, constraints.of(grammar=r"root ::= [^\x00]*"), temp=1.2)
    assert ruled.text == free.text


def test_a_grammar_that_leaves_no_token_is_an_error(tiny: Path) -> None:
    """llama.cpp ends the process there."""
    with closing(Llama(str(tiny), n_ctx=256, n_threads=1, verbose=False)) as small:
        banned = [f"{t}-inf" for t in range(small.n_vocab()) if completion.token_bytes(small, t) == b"Q"]

        def run(own: Constraints, temperature: float) -> list[str]:
            prompt, sampling = completion.raw_prompt(small, "the"), dict(temp=temperature) | own.sampling(small)
            return list(completion.Completion(small, prompt, 5, 1, sampling).pieces())

        for grammar, temperature in (('root ::= "Q"', 0.0), ('root ::= "a" "Q"', 1.0)):
            with pytest.raises(CacherouteError, match="No token of the model fits the grammar"):
                run(constraints.of(grammar=grammar, bias=banned), temperature)
        assert run(constraints.of(grammar='root ::= "aQ"'), 1.0) == ["a", "Q"], "and the model goes on"


def test_a_stop_string_ends_an_answer(llm: Llama) -> None:
    whole = answer(llm, Constraints()).text
    word = whole.split()[2]
    run = answer(llm, constraints.of(stop=[word, "never"]))
    assert run.text == whole[: whole.index(word)] and run.finish_reason == "stop"
    assert constraints.of(stop=[r"\n\n", r"\nabla", "\n"]).stop == ("\n\n", r"\nabla", "\n")


def test_a_bias_makes_a_token_likelier_or_impossible(llm: Llama) -> None:
    plain = answer(llm, Constraints())
    first = int(llm.input_ids[len(plain.prompt.tokens)])
    never = answer(llm, constraints.of(bias=[f"{first}-inf"]))
    tokens = [int(t) for t in llm.input_ids[len(plain.prompt.tokens) : llm.n_tokens]]
    assert first not in tokens and never.text != plain.text
    comma = llm.tokenize(b",", add_bos=False)[0]
    assert set(answer(llm, constraints.of(bias=[f"{comma}+60", f"{comma}+40"])).text) == {","}
    with pytest.raises(UsageError, match=r"no token 99999999 to give a bias to; it has \d+"):
        constraints.of(bias=["99999999+1"]).sampling(llm)


# ---- what is wrong with them


@pytest.mark.parametrize(
    ("own", "wrong"),
    [
        (
            {"grammar": "root ::= ("},
            r"^The grammar cannot be parsed \(.+\); llama\.cpp's grammars/README\.md describes the form\.$",
        ),
        ({"grammar": 'start ::= "a"'}, r"does not contain a 'root' symbol"),
        ({"grammar": "root ::= other"}, r"(?i)undefined rule identifier"),
        ({"grammar": 'root ::= root "a"'}, r"left recursion"),
        ({"grammar": "rubbish"}, r"The grammar cannot be parsed"),
        ({"grammar": " \n"}, r"The grammar is empty"),
        ({"grammar": 'root ::= "\0"'}, r"a NUL character"),
        ({"json_schema": "{"}, r"^The JSON schema is not valid JSON \(.+\); a file is @FILE\.$"),
        ({"json_schema": "[]"}, r"has to be an object"),
        ({"json_schema": '{"type": "nonsense"}'}, r"there is no type 'nonsense'; there are object, array,"),
        ({"json_schema": '{"type": "string", "type": "null"}'}, r"not valid JSON \(the key 'type' is there twice\)"),
        ({"json_schema": '{"$ref": "https://example.org/x"}'}, r"refers to another document"),
        ({"json_schema": '{"$ref": "#/nowhere"}'}, r"The JSON schema cannot be used"),
        ({"json_schema": '{"properties": 5}'}, r"The JSON schema cannot be used"),
        ({"json_schema": "{}", "grammar": 'root ::= "a"'}, r"one grammar"),
        ({"stop": [""]}, r"at least one letter"),
        ({"bias": ["15043"]}, r"'15043' is no bias of a token"),
        ({"bias": ["x+1"]}, r"is no bias"),
        ({"bias": ["5+nan"]}, r"is no bias"),
        ({"bias": ["5+inf"]}, r"is \+100"),
    ],
)
def test_what_cannot_be_meant(own: dict[str, Any], wrong: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=wrong) as e:
        constraints.of(**own)
    assert "\n" not in str(e.value)
    assert capfd.readouterr() == ("", ""), "what llama.cpp prints is in the sentence"


KEPT: list[dict[str, Any]] = [
    {"type": "integer", "title": "t", "description": "d", "default": 3, "examples": [1], "$schema": "s", "$id": "i"},
    {"type": "null", "$comment": "c", "deprecated": True, "readOnly": True, "x-own": 1},
    {"type": "array", "items": {"type": "null"}, "uniqueItems": False, "minItems": 0},
    {"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 2},
    {"type": "array", "prefixItems": [{"type": "null"}], "items": False, "minItems": 1, "maxItems": 1},
    {"type": "string", "minLength": 2, "maxLength": 3},
    {"type": "string", "enum": ["a", "b"]},
    {"type": ["string", "null"], "enum": ["a", None]},
    {"type": "string", "format": "date-time"},
    {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
    {"type": "object", "additionalProperties": {"type": "null"}},
    {"properties": {"not": {"type": "null"}, "minimum": {"type": "null"}, "$ref": {"type": "null"}}, "required": ["not"]},
    {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"type": "object", "properties": {"x": {"type": "null"}}}}},
    {"$ref": "#/$defs/my_node", "$defs": {"my_node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/my_node"}}}}},
]


@pytest.mark.parametrize("schema", KEPT, ids=json.dumps)
def test_a_schema_that_an_answer_is_kept_to(schema: dict[str, Any]) -> None:
    assert constraints.of(json_schema=json.dumps(schema)).of_schema


NOT_KEPT: list[tuple[dict[str, Any], str]] = [
    *(
        (
            {"type": "object", "properties": {"a": {"anyOf": [own, {"type": "null"}]}}},
            rf"'{list(own)[-1]}'.* at #/properties/a/anyOf/0",
        )
        for own in (
            {"type": "integer", "minimum": 1000},
            {"type": "integer", "maximum": 1010},
            {"type": "number", "exclusiveMinimum": 0},
            {"type": "number", "exclusiveMaximum": 0},
            {"type": "integer", "multipleOf": 7},
            {"type": "array", "items": {"type": "null"}, "uniqueItems": True},
            {"type": "array", "minItems": 3},
            {"type": "array", "contains": {"type": "null"}},
            {"type": "object", "minProperties": 2},
            {"type": "object", "maxProperties": 2},
            {"type": "object", "propertyNames": {"pattern": "^a$"}},
            {"type": "object", "patternProperties": {"^a$": {"type": "null"}}},
            {"type": "object", "dependentRequired": {"a": ["b"]}},
            {"type": "object", "required": ["a"]},
            {"type": "string", "if": {"minLength": 2}},
            {"type": "string", "not": {"const": "a"}},
            {"type": "string", "contentEncoding": "base64"},
            {"type": ["string", "null"], "minLength": 2},
            {"pattern": "^a*$", "minLength": 2},
            {"enum": ["a"], "minLength": 2},
            {"anyOf": [{"type": "string"}], "minLength": 2},
            {"properties": {}, "allOf": [{"properties": {}}]},
            {"type": "boolean", "unknown": 1},
        )
    ),
    ({"not": {}}, "'not'"),
    ({"type": "string", "format": "email"}, "there are date, time, date-time and uuid, not 'email'"),
    ({"type": "array", "items": {"type": "null"}, "minItems": 3, "maxItems": 2}, "'minItems' is larger than 'maxItems'"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "'minLength' is larger than 'maxLength'"),
    ({"type": "string", "minLength": 1.5}, "'minLength' is a whole number"),
    ({"enum": []}, "at least one value"),
    ({"anyOf": []}, "at least one schema"),
    ({"allOf": []}, "at least one schema"),
    ({"type": []}, "'type' names none"),
    ({"type": "integer", "enum": ["a"]}, "'enum' has a value that is no integer"),
    ({"type": "char"}, "there is no type 'char'"),
    ({"const": float("inf")}, "not JSON"),
    ({"properties": {"a": {"type": "null"}}, "required": ["b"]}, "'required' has 'b', which 'properties' lacks"),
    ({"type": "array", "prefixItems": [{"type": "null"}], "minItems": 2}, "as many items as 'prefixItems', 1"),
    ({"allOf": [{"type": "string"}]}, "only be objects with properties at #/allOf/0"),
    ({"allOf": [{"properties": {"a": {"type": "null"}}}] * 2}, "have the property 'a'"),
    ({"title": "anything"}, "it names no type"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "a pattern or a reference in it has no grammar"),
    ({"type": "string", "pattern": "^\0$"}, "no short form"),
]


@pytest.mark.parametrize(("schema", "wrong"), NOT_KEPT, ids=lambda part: json.dumps(part) if isinstance(part, dict) else "")
def test_a_schema_that_an_answer_would_not_be_kept_to(schema: dict[str, Any], wrong: str) -> None:
    with pytest.raises(UsageError, match=rf"^The JSON schema cannot be used \(.*{wrong}.*\); change that part of it\.$"):
        constraints.of(json_schema=json.dumps(schema))


@pytest.mark.parametrize("value", ['a"b', "c\\d", "\n", "\0", "\x7f", "é", "😀", {'q"': ["\\"]}])
def test_a_value_is_answered_as_it_is(llm: Llama, value: Any) -> None:
    for schema, expected in (({"const": value}, value), ({"properties": {str(value): {"const": 1}}}, {str(value): 1})):
        own = constraints.of(json_schema=json.dumps(schema | ({"required": [str(value)]} if "properties" in schema else {})))
        assert json.loads(answer(llm, own).text) == expected


def test_a_reference_is_not_mistaken_for_a_property_of_its_name(llm: Llama) -> None:
    schema = {
        "properties": {"address": {"const": 1}, "home": {"$ref": "#/$defs/address"}},
        "required": ["address", "home"],
        "$defs": {"address": {"const": 2}},
    }
    assert json.loads(answer(llm, constraints.of(json_schema=json.dumps(schema))).text) == {"address": 1, "home": 2}


def test_a_grammar_of_python_is_checked_too(llm: Llama) -> None:
    grammar = constraints._grammar("root ::= (")
    with pytest.raises(UsageError, match="The grammar cannot be parsed"):
        llm.create_completion("a", max_tokens=2, grammar=grammar)


# ---- the options


def command(*words: object, stdin: str = "") -> Outcome:
    return in_process([str(word) for word in words], stdin.encode())


def test_options_of_generate(demo_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text(json.dumps(SCHEMA))
    done = [
        command("generate", *RUN, *words) for words in (("-j", json.dumps(SCHEMA)), ("-jf", file), ("--json-schema", f"@{file}"))
    ]
    assert json.loads(done[0].stdout) and done[0].stdout == done[1].stdout == done[2].stdout
    (tmp_path / "g").write_text('root ::= "one" | "two"')
    told = command("generate", *RUN, "--grammar-file", tmp_path / "g", "-r", "wo", "-l", "5-1", "-l", "6+0.5", "-o", "json")
    assert json.loads(told.stdout)["text"] in ("one", "t")


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (("--grammar", "root ::= ("), "The grammar cannot be parsed"),
        (("--grammar-file", "nothing"), "nothing cannot be read"),
        (("-j", "{"), "not valid JSON"),
        (("-j", "@nothing"), "nothing cannot be read"),
        (("-j", "{}", "--grammar", "x"), "give one of --grammar"),
        (("--grammar", ""), "The grammar is empty"),
        (("--stop", ""), "at least one letter"),
        (("-l", "5"), "no bias"),
        (("--raw", "-sys", "x"), "leave out --raw"),
    ],
)
def test_wrong_options_are_one_sentence(tiny: Path, words: tuple[str, ...], wrong: str) -> None:
    for name in ("generate", "chat"):
        if name == "chat" and "--raw" in words:
            continue
        start = ("-p", "the") if name == "generate" else ()
        done = command(name, "-m", tiny, *start, *words)
        assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1) and wrong in done.stderr


def test_chat_takes_them_too(demo_model: Path) -> None:
    words = (
        "chat",
        "-n",
        8,
        "-t",
        1,
        "-c",
        256,
        "--temp",
        0,
        "--system-prompt",
        "Be brief.",
        "--grammar",
        'root ::= "ja" | "nein"',
    )
    done = command(*words, stdin="Is it late?\nIs it early?\n")
    assert done.code == 0 and set(done.stdout.split()) <= {"ja", "nein"} and len(done.stdout.split()) == 2


@pytest.mark.parametrize("form", ["json_object", "json_schema"])
def test_a_chat_in_python_keeps_to_a_schema_in_either_form_or_refuses_it(demo_model: Path, form: str) -> None:
    def wanted(schema: dict[str, Any]) -> dict[str, Any]:
        return {"type": form} | ({"schema": schema} if form == "json_object" else {"json_schema": {"schema": schema}})

    def ask(response_format: dict[str, Any]) -> str:
        asked = [{"role": "user", "content": "Is it late?"}]
        found = llm.create_chat_completion(asked, max_tokens=12, temperature=0.0, response_format=response_format)
        return str(found["choices"][0]["message"]["content"])

    with closing(Llama(str(demo_model), budget="50%", n_ctx=256, verbose=False)) as llm:
        late = {"type": "object", "properties": {"late": {"type": "boolean"}}, "required": ["late"]}
        assert type(json.loads(ask(wanted(late)))["late"]) is bool
        with pytest.raises(UsageError, match="an answer cannot be kept to 'minimum'"):
            ask(wanted({"type": "integer", "minimum": 5}))
        with pytest.raises(UsageError, match=r"^response_format is .*, not \{'type': 'xml'\}"):
            ask({"type": "xml"})
