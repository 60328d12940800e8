"""Put a `torchrun` that takes `--nproc` beside this interpreter, in place of torch's own script.

    .venv/bin/python -m launch.torchrun_script      # `make setup` does it

No distribution lists this file, so no installation or removal of Gemwright touches it. A new torch
writes its own script again; `make setup` puts this one back.
"""

from __future__ import annotations

import sys
from pathlib import Path

from train.files import replace_file

# The kernel takes no blank in an interpreter's path, so /bin/sh reads the first lines and Python skips them.
_SCRIPT = """\
#!/bin/sh
'''exec' "{python}" "$0" "$@"
' '''
import sys

from launch.torchrun import main

sys.exit(main())
"""


def write(python: Path) -> Path:
    """The script beside `python`, written unless it is there already."""
    script, text = python.with_name("torchrun"), _SCRIPT.format(python=python)
    if not script.is_file() or script.read_text() != text:
        replace_file(script, text, mode=0o755)
    return script


if __name__ == "__main__":
    write(Path(sys.executable))
