"""Entry point of ``cn-clip`` and ``python -m cn_clip``.

Signal handlers are set before anything large is imported.
"""

from __future__ import annotations

from cn_clip.processes import exit_after


def main() -> None:
    """Run the command line and exit."""
    exit_after(_run)


def _run() -> None:
    from cn_clip.cli import main

    main()


if __name__ == "__main__":
    main()
