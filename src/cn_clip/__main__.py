"""``python -m cn_clip`` is ``cn-clip``: the program, from its first line to its exit code.

It answers signals before anything large is imported.
"""

from __future__ import annotations

import sys

from cn_clip.processes import Interrupted, exit_on_signals, raise_on_signals


def main() -> None:
    """Run the command line and exit."""
    code = 0
    raise_on_signals()
    try:
        from cn_clip.cli import main as run_and_exit

        run_and_exit()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except Interrupted as error:  # before or after the command itself
        code = error.code
    exit_on_signals()
    sys.exit(code)


if __name__ == "__main__":
    main()
