"""The official script that scores image-to-text predictions: ``python -m
cn_clip.eval.evaluation_tr ANNOTATIONS PREDICTIONS OUT``."""

from __future__ import annotations

from collections.abc import Sequence

from cn_clip.cli.official import run_script
from cn_clip.eval.evaluation import score


def main(arguments: Sequence[str]) -> int:
    """Score predictions of texts for images; return the exit code."""
    return score("image_to_text", "evaluation_tr", arguments)


if __name__ == "__main__":
    run_script(main)
