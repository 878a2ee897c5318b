"""Which keywords of a JSON schema llama-cpp-python's converter keeps an answer to; what it would pass over is refused.

Of a schema the converter follows the first that it finds of `$ref`, `oneOf` or `anyOf`, several types, `const`, `enum`, ..., and
passes over all that stands beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote

_ANNOTATIONS = {
    *("$schema", "$id", "id", "$comment", "$anchor", "$vocabulary", "$defs", "definitions", "title", "description"),
    *("default", "example", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"),
}
_KEPT_SOMEWHERE = {
    *("type", "oneOf", "anyOf", "allOf", "const", "enum", "properties", "required", "additionalProperties", "items"),
    *("prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format"),
}
# with these values they forbid nothing, wherever they stand
_NO_LIMITS: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "minItems": (0,),
    "minLength": (0,),
    "minProperties": (0,),
    "required": ([],),
    "items": (True, {}),
    "patternProperties": ({},),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "propertyNames": (True, {}),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    "additionalItems": (True, {}),
    "nullable": (False,),
    "not": (False,),
}
_FORMAT = re.compile(r"uuid[1-5]?|date|time|date-time")
_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "null": type(None),
}
_LONGEST_PATH = 60


def check(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What each `$ref` of it stands for. Leaves out of the schema what forbids nothing, which could lead the converter astray.

    Raises ValueError, whose text is the reason, for a keyword that an answer would not be kept to, and for a contradiction.
    """
    check = _Check(schema)
    check.visit(schema, "#")
    return check.refs


class _Check:
    """A walk by the converter's own order; `where` is the JSON pointer of a schema."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self.refs: dict[str, dict[str, Any]] = {}

    def visit(self, node: Any, where: str) -> None:
        if not isinstance(node, dict):
            raise ValueError(f"a part of it is no schema{_at(where)}")
        if not node:
            return  # an object, for the converter
        _leave_out_no_limits(node)
        kind, given = node.get("type"), _given(node)
        if node.get("$ref") is not None:
            _only(node, ["$ref"], "'$ref'", where)
            self._refer(node["$ref"], where)
        elif "oneOf" in given or "anyOf" in given:
            self._union(node, "oneOf" if "oneOf" in given else "anyOf", where)
        elif "const" in given or "enum" in given:
            _constants(node, "const" if "const" in given else "enum", where)
        elif isinstance(kind, list):
            _only(node, ["type"], "several types", where)
            _types(kind, where)
        else:
            if kind is not None:
                _types([kind], where)
            self._of_one_type(node, kind, given, where)

    def _of_one_type(self, node: dict[str, Any], kind: str | None, given: set[str], where: str) -> None:
        closed = node.get("additionalProperties", True) is not True
        if kind in (None, "object") and ("properties" in given or closed):
            self._object(node, where)
        elif kind in (None, "object") and "allOf" in given:
            self._all_of(node, where)
        elif kind in (None, "array") and ("items" in given or "prefixItems" in given):
            self._array(node, where)
        elif kind in (None, "string") and "pattern" in given:
            _only(node, ["type", "pattern"], "'pattern'", where)
        elif kind in (None, "string") and "format" in given:
            if not isinstance(node["format"], str) or not _FORMAT.fullmatch(node["format"]):
                raise ValueError(f"of formats there are date, time, date-time and uuid, not {node['format']!r}{_at(where)}")
            _only(node, ["type", "format"], "'format'", where)
        elif kind is None:
            _only(node, [], "", where)
            raise ValueError(f"it names no type{_at(where)}")
        else:
            own = {"string": ["minLength", "maxLength"], "object": ["additionalProperties"]}
            _only(node, ["type", *own.get(kind, [])], f"type {kind!r}", where)
            _in_order(node, "minLength", "maxLength", where)

    def _refer(self, ref: Any, where: str) -> None:
        if not isinstance(ref, str) or ref in self.refs:
            return
        if not ref.startswith("#"):
            raise ValueError(f"it refers to another document{_at(where)}")
        here: Any = self._root
        for part in ref[1:].split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            try:
                here = here[int(name) if isinstance(here, list) else name]
            except (LookupError, ValueError, TypeError):
                raise ValueError(f"it refers to {ref[:_LONGEST_PATH]}, which it does not have{_at(where)}") from None
        self.refs[ref] = here
        self.visit(here, ref)

    def _union(self, node: dict[str, Any], name: str, where: str) -> None:
        ways = node[name]
        if not isinstance(ways, list) or not ways:
            raise ValueError(f"{name!r} is a list of at least one schema{_at(where)}")
        kind = node.get("type")
        kinds = kind if isinstance(kind, list) else [kind]
        stated = kind is not None and all(isinstance(way, dict) and way.get("type") in kinds for way in ways)
        _only(node, [name, "type"] if stated else [name], repr(name), where)
        for i, way in enumerate(ways):
            self.visit(way, f"{where}/{name}/{i}")

    def _object(self, node: dict[str, Any], where: str) -> None:
        _only(node, ["type", "properties", "required", "additionalProperties"], "'properties'", where)
        properties, more = node.get("properties", {}), node.get("additionalProperties", False)
        _required(node, properties, where)
        for name, own in properties.items():
            self.visit(own, f"{where}/properties/{name}")
        if not isinstance(more, bool):
            self.visit(more, f"{where}/additionalProperties")

    def _all_of(self, node: dict[str, Any], where: str) -> None:
        """The converter makes one object of the properties of all of them, and keeps to nothing else."""
        _only(node, ["type", "required", "allOf"], "'allOf'", where)
        parts, every = node["allOf"], dict[str, Any]()
        if not isinstance(parts, list) or not parts:
            raise ValueError(f"'allOf' is a list of at least one schema{_at(where)}")
        for i, part in enumerate(parts):
            own = f"{where}/allOf/{i}"
            self.visit(part, own)
            part = self.refs.get(part.get("$ref"), part)
            if "properties" not in part:
                raise ValueError(f"in 'allOf' there can only be objects with properties{_at(own)}")
            _only(part, ["type", "properties", "required", "additionalProperties"], "'allOf'", own)
            if len(parts) > 1 and part.get("additionalProperties", True) is not True:
                raise ValueError(f"an answer cannot be kept to 'additionalProperties' within 'allOf'{_at(own)}")
            if twice := every.keys() & part["properties"].keys():
                raise ValueError(f"two parts of 'allOf' have the property {min(twice)!r}{_at(where)}")
            every |= part["properties"]
        _required(node, every, where)

    def _array(self, node: dict[str, Any], where: str) -> None:
        _in_order(node, "minItems", "maxItems", where)
        items = node.get("items") or node.get("prefixItems")
        if not isinstance(items, list):
            _only(node, ["type", "items", "minItems", "maxItems"], "'items'", where)
            self.visit(node["items"], f"{where}/items")
            return
        name, closed = ("items", "additionalItems") if isinstance(node.get("items"), list) else ("prefixItems", "items")
        if node.get(closed, False) is not False:
            raise ValueError(f"an answer cannot be kept to {closed!r} beside {name!r}{_at(where)}")
        _only(node, ["type", name, closed, "minItems", "maxItems"], repr(name), where)
        if not node.get("minItems", 0) <= len(items) <= node.get("maxItems", len(items)):
            raise ValueError(f"an answer has as many items as {name!r}, {len(items)}{_at(where)}")
        for i, item in enumerate(items):
            self.visit(item, f"{where}/{name}/{i}")


def _given(node: dict[str, Any]) -> set[str]:
    """The keywords that are to keep an answer to something."""
    return {key for key in node if key not in _ANNOTATIONS and not key.startswith("x-")}


def _leave_out_no_limits(node: dict[str, Any]) -> None:
    for key in list(node):
        if any(type(node[key]) is type(value) and node[key] == value for value in _NO_LIMITS.get(key, ())) and len(node) > 1:
            del node[key]


def _only(node: dict[str, Any], kept: Iterable[str], beside: str, where: str) -> None:
    """Raises ValueError for keywords that are not among those `kept` there."""
    unknown = sorted(_given(node) - set(kept))
    if unknown:
        elsewhere = unknown[0] in _KEPT_SOMEWHERE and beside
        raise ValueError(f"an answer cannot be kept to {unknown[0]!r}{f' beside {beside}' if elsewhere else ''}{_at(where)}")


def _types(kinds: list[Any], where: str) -> None:
    if not kinds:
        raise ValueError(f"'type' names none{_at(where)}")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in _TYPES:
            raise ValueError(f"there is no type {kind!r}{_at(where)}; there are {', '.join(_TYPES)}")


def _constants(node: dict[str, Any], name: str, where: str) -> None:
    values = [node["const"]] if name == "const" else node["enum"]
    if not isinstance(values, list) or not values:
        raise ValueError(f"'enum' is a list of at least one value{_at(where)}")
    _only(node, ["type", name], repr(name), where)
    if "type" not in node:
        return
    kinds = node["type"] if isinstance(node["type"], list) else [node["type"]]
    _types(kinds, where)
    for value in values:
        if not any(_is(value, kind) for kind in kinds):
            raise ValueError(f"{name!r} has a value that is no {' or '.join(kinds)}{_at(where)}")
    del node["type"]  # the converter would follow several types instead


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES[kind]) or (kind == "integer" and isinstance(value, float) and value.is_integer())


def _required(node: dict[str, Any], properties: Any, where: str) -> None:
    required = node.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise ValueError(f"'properties' is an object and 'required' a list{_at(where)}")
    for name in required:
        if name not in properties:
            raise ValueError(f"'required' has {name!r}, which 'properties' lacks{_at(where)}")


def _in_order(node: dict[str, Any], low: str, high: str, where: str) -> None:
    for name in (low, high):
        value = node.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name!r} is a whole number, 0 or more{_at(where)}")
    if node.get(low, 0) > node.get(high, node.get(low, 0)):
        raise ValueError(f"{low!r} is larger than {high!r}{_at(where)}")


def _at(where: str) -> str:
    """Nothing for the whole schema."""
    return "" if where == "#" else f" at {where if len(where) <= _LONGEST_PATH else '#...' + where[-_LONGEST_PATH:]}"
