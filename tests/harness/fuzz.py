"""Values of every type that JSON has, at their edges, to put where others belong."""

from __future__ import annotations

from typing import Any

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    10**30,
    0.5,
    -0.0,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "text",
    "7",
    "../..",
    "a\nb",
    "\x00",
    "\ud800",
    "é漢🙂",
    [],
    [1, "a", None],
    [[[]]],
    {},
    {"a": 1},
    {"type": "text"},
)
