"""A check, before anything is imported, that the packages of that name are Gemwright's.

The packages have everyday names, so a user's `data.py` or another distribution's `train` may stand
before them on the path. Only the standard library is imported here, so that this is found before it hurts.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path

PACKAGES = ("configs", "data", "launch", "model", "parallel", "train")
HOME = Path(__file__).resolve().parent.parent
# How long other ranks leave the word to the first of their node before they say the same.
_COURTESY_SECONDS = 10


def foreign_package() -> str | None:
    """One line on the first package that is not the one beside this file, or None; nothing is imported."""
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
        if not places:
            return f"the package '{name}' is missing in {HOME}; install Gemwright again."
        found = Path(places[0]).resolve()
        if found != HOME / name / "__init__.py":
            place = found.parent if found.name == "__init__.py" else found
            return (
                f"the package '{name}' is {place}, not Gemwright's {HOME / name}; start in another folder, "
                f"take {place.parent} off PYTHONPATH, or rename or uninstall it."
            )
    return None


def require_own_packages() -> None:
    """Exit 1 with one line where somebody else's package would be imported in place of Gemwright's."""
    message = foreign_package()
    if message:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_COURTESY_SECONDS)
        sys.exit(f"error: {message}")
