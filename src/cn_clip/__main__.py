"""Entry point of ``cn-clip`` and ``python -m cn_clip``.

Signal handlers are set before anything large is imported.
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
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except Interrupted as error:  # before or after the command runs
        code = error.code
    exit_on_signals()
    sys.exit(code)


if __name__ == "__main__":
    main()
