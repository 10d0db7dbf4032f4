"""The official script that searches texts by images:
``python -m cn_clip.eval.make_topk_predictions_tr``."""

from __future__ import annotations

from collections.abc import Sequence

from cn_clip.cli.official import run_script
from cn_clip.eval.make_topk_predictions import predict


def main(arguments: Sequence[str]) -> int:
    """Write the best texts of every image; return the exit code."""
    return predict("image_to_text", "make_topk_predictions_tr", arguments)


if __name__ == "__main__":
    run_script(main)
