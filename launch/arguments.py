"""KEY=VALUE arguments of the launch commands, checked against a dataclass."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from model.errors import UserError, nearest

T = TypeVar("T")


def parse(schema: type[T], arguments: list[str], words: str | None = None) -> T:
    """A `schema` from KEY=VALUE texts. A list field takes its key once for each item, a dict {NAME: TEXT, ...}.

    A list field with choices also takes several at once, as [A,B], and none, as [].

    words: the list field that takes what has no key. A field's metadata may have `choices`, the texts that are legal.
    Raises `UserError` for an unknown key, a wrong type, or a field without default that is not given.
    """
    hints, fields = get_type_hints(schema), _fields(schema)
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if words and not equals:
            key, equals, text = words, "=", argument
        if key not in hints:
            raise UserError(f"{key} is no argument; nearest: {nearest(key, hints)} (all: {', '.join(hints)}).")
        if not equals:
            raise UserError(f"'{argument}' is not KEY=VALUE; write {key}=....")
        is_list, legal = get_origin(hints[key]) is list, fields[key].metadata.get("choices")
        items = _items(text) if is_list and legal else [text]
        for item in items:
            if legal and item not in legal:
                raise UserError(
                    f"{key}={item} does not exist; nearest: {nearest(item, legal)} (all: {', '.join(legal)})."
                )
        if is_list:
            values.setdefault(key, []).extend(_convert(key, item, hints[key]) for item in items)
        elif key in values:
            raise UserError(f"{key} is given twice; give it once.")
        else:
            values[key] = _convert(key, text, hints[key])
    for name in _required(schema):
        if name not in values:
            raise UserError(f"{name}=... is missing; --help shows an example.")
    return schema(**values)


def run(schema: type[T], command: Callable[[T], None], doc: str | None, words: str | None = None) -> None:
    """Parse the command line, run, and turn a mistake into one line and exit status 1."""
    arguments = sys.argv[1:]
    asked = {"-h", "--help"}.intersection(arguments)
    if asked or (not arguments and _required(schema)):
        print((doc or "").strip())
        sys.exit(0 if asked else 1)
    try:
        command(parse(schema, arguments, words))
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error}; mend it and run again.")


def _fields(schema: type[T]) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(schema)}  # type: ignore[arg-type]


def _required(schema: type[T]) -> list[str]:
    missing = dataclasses.MISSING
    return [name for name, field in _fields(schema).items() if field.default is field.default_factory is missing]


def _convert(key: str, text: str, hint: Any) -> Any:
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    kind = kinds[0]
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{key}={text} has the wrong type; {key} is true or false.")
        return text.lower() == "true"
    if get_origin(hint) is dict:
        return _texts_by_name(key, text)
    try:
        return kind(text)
    except ValueError:
        what = {int: "a whole number", float: "a number"}[kind]
        raise UserError(f"{key}={text} has the wrong type; {key} is {what}.") from None


def _items(text: str) -> list[str]:
    bare = text.removeprefix("[").removesuffix("]")
    return [item.strip() for item in bare.split(",")] if bare else []


def _texts_by_name(key: str, text: str) -> dict[str, str]:
    pairs = [item.partition(":") for item in text.removeprefix("{").removesuffix("}").split(",")]
    if text[:1] + text[-1:] != "{}" or not all(name.strip() and item.strip() for name, _, item in pairs):
        raise UserError(f"{key}={text} has the wrong type; {key} is {{NAME: TEXT, ...}}.")
    return {name.strip(): item.strip() for name, _, item in pairs}
