"""Tokens of a conversation, marked for a reader."""

from __future__ import annotations

from data.chat.show import GREEN, LEFT, RESET, RIGHT, mark


def test_borders_and_soft_tokens() -> None:
    pieces = ["<|image>", *["<|image|>"] * 3, "<image|>", "a", "", "ü\x1b[31m", "<turn|>", "\n"]
    supervised = [False] * 5 + [True] * 4 + [False]
    assert mark(pieces, supervised, colour=False, borders=True) == (
        f"<|image>·<|image|>x3·<image|>{LEFT}a·ü\\x1b[31m·<turn|>{RIGHT}\n"
    )
    assert mark(pieces, supervised) == f"<|image><|image|>x3<image|>{GREEN}aü\\x1b[31m<turn|>{RESET}\n"
    assert mark(["a\n\n", "b"], [True, True]) == f"{GREEN}a{RESET}\n\n{GREEN}b{RESET}"
