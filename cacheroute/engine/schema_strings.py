"""Strings of a JSON schema as rules of a grammar (GBNF): what matches a `pattern`, and names other than some.

llama-cpp-python's converter takes a pattern for a text of GBNF: quotes end a string there, `\\d` is a letter, and a `]` alone is
never passed. Here Python's own parser of regular expressions reads it, and what JSON has to escape is escaped.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

if hasattr(re, "_parser"):
    _parser: Any = re._parser
else:  # Python 3.10
    import sre_parse as _parser

_Ranges = list[tuple[int, int]]

_LAST = 0x10FFFF
_SHORT = {0x08: "b", 0x09: "t", 0x0A: "n", 0x0C: "f", 0x0D: "r", 0x22: '"', 0x5C: "\\"}  # JSON's escapes of one letter
_PLAIN: _Ranges = [(0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7E), (0x80, 0xD7FF), (0xE000, _LAST)]
_CATEGORIES: dict[str, _Ranges] = {
    "DIGIT": [(0x30, 0x39)],
    "WORD": [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
    "SPACE": [(0x09, 0x0D), (0x20, 0x20)],
}
# white space for ECMA and not for others: neither \s nor \S
_WIDE_SPACES: _Ranges = [
    *((c, c) for c in (0x85, 0xA0, 0x1680, 0x202F, 0x205F, 0x3000, 0xFEFF)),
    (0x2000, 0x200A),
    (0x2028, 0x2029),
]
_MOST_REPEATS = 2000
"""llama.cpp refuses grammars with more."""
_NOTHING = '""'


def matching(pattern: str) -> str:
    """The body of a rule for a JSON string, its quotes included, that matches a regular expression as a whole.

    Classes are those of ECMA (`\\d` is 0 to 9). Raises ValueError, whose text is the reason, for a pattern that is not
    anchored at both ends, and for what no grammar has (looking around, references to groups, flags).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FutureWarning about sets
            parsed = _parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise ValueError(f"the pattern {pattern[:60]!r} is no regular expression: {e}") from None
    if parsed.state.flags & ~re.UNICODE:
        raise ValueError(f"the pattern {pattern[:60]!r} has flags")
    items = list(parsed)
    if len(items) < 2 or _anchor(items[0]) != "AT_BEGINNING" or _anchor(items[-1]) != "AT_END":
        raise ValueError(f"the pattern {pattern[:60]!r} does not begin with ^ and end with $, outside of a choice with |")
    try:
        return _quoted(_sequence(items[1:-1]))
    except ValueError as e:
        raise ValueError(f"no answer can be kept to the pattern {pattern[:60]!r}: {e}") from None


def others(names: Iterable[str]) -> str:
    """The body of a rule for a JSON string, its quotes included, that is none of `names` (and has nothing to escape)."""
    return _quoted(_others(sorted(set(names))))


def _quoted(body: str) -> str:
    return " ".join(filter(None, ['"\\""', body, '"\\"" space']))


def _others(names: Sequence[str]) -> str:
    """A text that is none of these; "" means that it may be empty."""
    heads = sorted({name[0] for name in names if name})
    anything = f"{_set(_PLAIN)}*"
    ways = [f"{_set(_without(_PLAIN, [(ord(h), ord(h)) for h in heads]))} {anything}"]
    for head in heads:
        if _within(ord(head), _PLAIN):
            ways.append(f"{_set([(ord(head), ord(head))])} {_others([n[1:] for n in names if n[:1] == head])}")
    return f"({' | '.join(ways)}){'' if '' in names else '?'}"


def _anchor(item: Any) -> str:
    return str(item[1]) if str(item[0]) == "AT" else ""


def _sequence(items: Iterable[Any]) -> str:
    return " ".join(filter(None, (_item(str(op), value) for op, value in items)))


def _item(op: str, value: Any) -> str:
    """Raises ValueError, whose text is the reason, for what no grammar has."""
    if op == "LITERAL":
        return _characters([(value, value)])
    if op == "NOT_LITERAL":
        return _characters(_all_but([(value, value)]))
    if op == "ANY":
        return _characters(_all_but([(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)]))
    if op == "IN":
        return _characters(_members(value))
    if op == "SUBPATTERN" and not value[1] and not value[2]:
        return f"({_sequence(value[3]) or _NOTHING})"
    if op == "BRANCH":
        return f"({' | '.join(_sequence(way) or _NOTHING for way in value[1])})"
    if op in ("MAX_REPEAT", "MIN_REPEAT"):
        low, high, what = value
        body = _sequence(what)
        low, high = int(low), None if high == _parser.MAXREPEAT else int(high)
        if max(low, high or 0) > _MOST_REPEATS:
            raise ValueError(f"it repeats something more than {_MOST_REPEATS} times")
        times = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((low, high), f"{{{low},{'' if high is None else high}}}")
        return f"({body}){times}" if body and high != 0 else ""
    raise ValueError({"AT": "^, $ or \\b within it", "GROUPREF": "a reference to a group"}.get(op, "what looks around, or flags"))


def _members(items: Sequence[Any]) -> _Ranges:
    """Of a set in square brackets."""
    found: _Ranges = []
    negated = False
    for op, value in items:
        match str(op):
            case "NEGATE":
                negated = True
            case "LITERAL":
                found.append((value, value))
            case "RANGE":
                found.append((int(value[0]), int(value[1])))
            case _:
                name = str(value).removeprefix("CATEGORY_")
                own = _CATEGORIES[name.removeprefix("NOT_")]
                found += _all_but([*own, *(_WIDE_SPACES if name == "NOT_SPACE" else [])]) if name.startswith("NOT_") else own
    return _all_but(found) if negated else found


def _characters(ranges: _Ranges) -> str:
    """One of these, as JSON has it within a string. Control characters without an escape of one letter are left out."""
    ways = [_set(plain)] if (plain := _common(ranges, _PLAIN)) else []
    ways += [f'"\\\\{_escaped(ord(letter))}"' for code, letter in _SHORT.items() if _within(code, ranges)]
    if not ways:
        raise ValueError("a character that JSON has no short form for")
    return ways[0] if len(ways) == 1 else f"({' | '.join(ways)})"


def _set(ranges: _Ranges) -> str:
    return "[" + "".join(_escaped(a) + (f"-{_escaped(b)}" if b > a else "") for a, b in ranges) + "]"


def _escaped(code: int) -> str:
    """A character in GBNF, in a set or in quotes."""
    if code < 0x80 and chr(code).isalnum():
        return chr(code)
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"


def _within(code: int, ranges: _Ranges) -> bool:
    return any(a <= code <= b for a, b in ranges)


def _common(these: _Ranges, those: _Ranges) -> _Ranges:
    return sorted({(max(a, c), min(b, d)) for a, b in these for c, d in those if max(a, c) <= min(b, d)})


def _all_but(ranges: _Ranges) -> _Ranges:
    return _without([(0, _LAST)], ranges)


def _without(these: _Ranges, those: _Ranges) -> _Ranges:
    for c, d in those:
        these = [part for a, b in these for part in ((a, min(b, c - 1)), (max(a, d + 1), b)) if part[0] <= part[1]]
    return these
