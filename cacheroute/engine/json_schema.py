"""The grammar of a JSON schema, by llama-cpp-python's converter; a schema that an answer would not be kept to has none."""

from __future__ import annotations

import json
import re
from importlib import import_module
from typing import Any

from cacheroute.engine import schema_check, schema_strings
from cacheroute.errors import UsageError
from cacheroute.files import one_of_each
from cacheroute.install import patched_llama_cpp

# llama-cpp-python's rule of a character lets control characters into strings, where JSON has none; llama.cpp's own does not
_CHARACTER = re.compile(r'^char ::= \[\^"\\\\\]', re.MULTILINE)
_JSON_CHARACTER = r'char ::= [^"\\\\\\x7F\\x00-\\x1F]'
_ANY_NAME = "string "  # the converter's rule of a name begins so
_LONGEST_REASON = 240


class SchemaError(UsageError):
    """A JSON schema that an answer cannot be kept to."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The JSON schema cannot be used ({reason.rstrip('.')}); change that part of it.")


def to_grammar(text: str) -> str:
    """The GBNF of a JSON schema. Raises UsageError for what is none, SchemaError for one that an answer cannot be kept to."""
    try:
        schema = json.loads(text, object_pairs_hook=one_of_each)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"The JSON schema is not valid JSON ({_line(e)}); a file is @FILE.") from None
    if not isinstance(schema, dict):
        raise UsageError('The JSON schema has to be an object, such as {"type": "object"}.')
    try:
        converter = _converter(schema_check.check(schema))
        converter.visit(schema, "")
        return _CHARACTER.sub(_JSON_CHARACTER, str(converter.format_grammar()))
    except Exception as e:  # the converter raises whatever it stumbles over
        raise SchemaError(_line(e)) from None


def of_response_format(asked: Any) -> str | None:
    """The GBNF of what `response_format` of a chat asks for; None where that is any text, or any JSON object.

    Raises UsageError for another form or type than the OpenAI API's and llama-cpp-python's, SchemaError as to_grammar() does.
    """
    kind = asked.get("type") if isinstance(asked, dict) else None
    if asked is None or kind == "text":
        return None
    if kind == "json_schema" and isinstance(asked.get("json_schema"), dict) and "schema" in asked["json_schema"]:
        return to_grammar(json.dumps(asked["json_schema"]["schema"]))
    if kind == "json_object":
        return None if asked.get("schema") is None else to_grammar(json.dumps(asked["schema"]))
    raise UsageError(
        'response_format is {"type": "text"}, {"type": "json_object"}, with a "schema" or without, or {"type": "json_schema", '
        f'"json_schema": {{"schema": ...}}}}, not {str(asked)[:80]}.'
    )


def _converter(refs: dict[str, dict[str, Any]]) -> Any:
    """llama-cpp-python's, which writes quotes, backslashes and control characters of values and names so that the parser of
    grammars takes them for those, and gives what is referred to a name that no property has. A pattern is kept to within JSON,
    and a property of `additionalProperties` has none of the names that the object gives a type of their own."""
    module = import_module(f"{patched_llama_cpp.module().__name__}.llama_grammar")
    converter = module.SchemaConverter(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
    names: dict[str, str] = {}

    def resolved(ref: str) -> str:
        if ref not in names:
            names[ref] = f"schema-ref-{len(names)}"  # for what refers to itself
            names[ref] = converter.visit(refs[ref], names[ref])
        return names[ref]

    add_rule, build_object = converter._add_rule, converter._build_object_rule
    own_names: list[list[str]] = []  # of the objects that are being built, the innermost last

    def added(name: str, rule: str) -> str:
        if name.endswith("additional-kv") and rule.startswith(_ANY_NAME):
            rule = f"{add_rule(f'{name}-name', schema_strings.others(own_names[-1]))} {rule.removeprefix(_ANY_NAME)}"
        return str(add_rule(name, rule))

    def built(properties: list[tuple[str, Any]], required: set[str], name: str, additional_properties: Any) -> str:
        own_names.append([name for name, _ in properties])
        try:
            return str(build_object(properties, required, name, additional_properties))
        finally:
            own_names.pop()

    converter._refs, converter._format_literal, converter._resolve_ref = refs, _literal, resolved
    converter._add_rule, converter._build_object_rule = added, built
    converter._visit_pattern = lambda pattern, name: added(name, schema_strings.matching(pattern))
    return converter


def _literal(value: str) -> str:
    """Of a value that is written in JSON."""
    text = json.dumps(json.loads(value), ensure_ascii=False, allow_nan=False)
    text = re.sub("[\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", text)  # half a pair has no other form
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _line(e: Exception) -> str:
    said = " ".join(str(e).split()).rstrip(".")
    if isinstance(e, RecursionError):
        return "it is nested too deeply"
    if isinstance(e, AttributeError | TypeError | KeyError):
        return "a part of it is no schema"
    return said[:_LONGEST_REASON] if isinstance(e, AssertionError | ValueError) and said else type(e).__name__
