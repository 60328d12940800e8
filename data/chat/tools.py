"""Tool syntax of the chat format: values, calls and declarations; keys are bare, strings stand in quote tokens.

Where the released template writes unbalanced braces or drops a schema key, so does this: the model was trained on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data.chat.fields import printable

_QUOTE = '<|"|>'
_OWN_KEYS = ("description", "type", "properties", "required", "nullable")


def quoted(text: object) -> str:
    """A string as the chat template writes it, between its own quotation marks."""
    return f"{_QUOTE}{text}{_QUOTE}"


def format_value(value: Any, null: str = "null", quote_keys: bool = False) -> str:
    """A JSON value without spaces; `null` is how None is spelled."""
    if value is None:
        return null
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, Mapping):
        return _braced(
            f"{quoted(key) if quote_keys else key}:{format_value(item, null, quote_keys)}"
            for key, item in sorted_ignoring_case(value)
        )
    if isinstance(value, list | tuple):
        return "[" + ",".join(format_value(item, null, quote_keys) for item in value) + "]"
    return str(value)


def format_declaration(function: Mapping[str, Any], null: str = "null") -> str:
    """One function as the model sees it; raises `TypeError` or `AttributeError` on a schema of the wrong shape."""
    parameters, text = function.get("parameters"), ""
    if parameters:
        text += ",parameters:{" + _parameters(parameters if isinstance(parameters, Mapping) else {}, null)
    if "response" in function:
        response = function["response"]
        text += ",response:{" + _response(response if isinstance(response, Mapping) else {})
    return f"declaration:{function.get('name', '')}{{description:{quoted(function.get('description', ''))}{text}}}"


def unread_keys(function: Mapping[str, Any]) -> Iterator[str]:
    """Keys of a declared function that `format_declaration` leaves out; those of all properties have one place."""
    parameters, response = function.get("parameters"), function.get("response")
    yield from _others(function, ("name", "description", "parameters", "response"), "")
    if isinstance(parameters, Mapping):
        yield from _others(parameters, ("properties", "required", "type"), "parameters.")
        yield from _unread_properties(parameters.get("properties"))
    if isinstance(response, Mapping):
        read = ("description", "type") if _type(response) == "OBJECT" else ("description",)
        yield from _others(response, read, "response.")


def sorted_ignoring_case(mapping: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Items in the order in which the template's `dictsort` puts them."""
    return sorted(mapping.items(), key=lambda item: item[0].lower())


def _others(schema: Mapping[str, Any], read: Iterable[str], place: str) -> Iterator[str]:
    return (place + printable(key) for key in schema if key not in read)


def _unread_properties(properties: Any) -> Iterator[str]:
    """Keys that `_property` leaves out of any of these properties, or of those inside them."""
    for schema in properties.values() if isinstance(properties, Mapping) else ():
        if not isinstance(schema, Mapping):
            yield "parameters.properties[]"
            continue
        kind, items, inner = _type(schema), schema.get("items"), schema.get("properties")
        read = ["description", "type", "nullable"]
        read += ["enum"] * (kind == "STRING") + ["items"] * (kind == "ARRAY" and isinstance(items, Mapping))
        if kind == "ARRAY" and isinstance(items, Mapping):
            yield from _unread_properties(items.get("properties"))
        if kind == "OBJECT" and isinstance(inner, Mapping):
            read += ["properties", "required"]
            yield from _unread_properties(inner)
        elif kind == "OBJECT":  # each of its keys is written as a property
            read += schema
        yield from _others(schema, read, "parameters.properties[].")


def _parameters(schema: Mapping[str, Any], null: str) -> str:
    text = ""
    if schema.get("properties"):
        text += f"properties:{_properties(schema['properties'], null)},"
    if schema.get("required"):
        text += f"required:{_names(schema['required'])},"
    return text + _closing_type(schema)


def _response(schema: Mapping[str, Any]) -> str:
    text = f"description:{quoted(schema['description'])}," if schema.get("description") else ""
    return text + (_closing_type(schema) if _type(schema) == "OBJECT" else "")


def _closing_type(schema: Mapping[str, Any]) -> str:
    # The closing brace comes with the type: a schema without one stays open.
    return f"type:{quoted(_type(schema))}}}" if schema.get("type") else ""


def _properties(properties: Mapping[str, Any], null: str) -> str:
    return _braced(f"{name}:{{{_property(schema, null)}}}" for name, schema in sorted_ignoring_case(properties))


def _property(schema: Any, null: str) -> str:
    if not isinstance(schema, Mapping):
        schema = {}
    kind, items, fields = _type(schema), schema.get("items"), []
    if schema.get("description"):
        fields.append(f"description:{quoted(schema['description'])}")
    if kind == "STRING" and schema.get("enum"):
        fields.append(f"enum:{format_value(schema['enum'], null)}")
    if kind == "ARRAY" and items and isinstance(items, Mapping):
        fields.append("items:" + _braced(_item(*item, null) for item in sorted_ignoring_case(items)))
    if schema.get("nullable"):
        fields.append("nullable:true")
    if kind == "OBJECT":
        inner = schema.get("properties")
        if not isinstance(inner, Mapping):
            inner = {name: value for name, value in schema.items() if name not in _OWN_KEYS}
        fields.append(f"properties:{_properties(inner, null)}")
        if schema.get("required"):
            fields.append(f"required:{_names(schema['required'])}")
    return ",".join([*fields, f"type:{quoted(kind)}"])


def _item(key: str, value: Any, null: str) -> str:
    """One key of the schema of an array's items; none for null."""
    if value is None:
        return ""
    if key == "properties":
        return f"properties:{_properties(value if isinstance(value, Mapping) else {}, null)}"
    if key == "required":
        return f"required:{_names(value)}"
    if key == "type":
        kinds = quoted(value.upper()) if isinstance(value, str) else _names(str(kind).upper() for kind in value)
        return f"type:{kinds}"
    return f"{key}:{format_value(value, null, quote_keys=True)}"


def _type(schema: Mapping[str, Any]) -> str:
    return str(schema.get("type", "")).upper()


def _names(names: Iterable[object]) -> str:
    return "[" + ",".join(quoted(name) for name in names) + "]"


def _braced(fields: Iterable[str]) -> str:
    return "{" + ",".join(field for field in fields if field) + "}"
