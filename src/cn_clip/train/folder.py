"""A run's folder: who may train in it, which recipe it is of, and whether it has ended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cn_clip import distributed
from cn_clip.errors import CheckpointError, CNClipError, UsageError
from cn_clip.publish import published
from cn_clip.train.checkpoint import states
from cn_clip.train.reading import difference, from_toml
from cn_clip.train.recipe import Recipe

# Options that decide nothing about the weights, so they may change when a run goes on.
_FREE = (
    "data.workers", "data.prefetch_mb", "output.folder", "output.keep", "output.log_every",
    "output.save_every", "output.tensorboard", "output.swanlab", "output.wandb",
)  # fmt: skip
_RECIPE, _OUTCOME = "recipe.toml", "outcome.json"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    ``scores`` holds, in order, where each was measured and the mean recall there: ``before``, the
    best of each stage, its mixture (``NAME, mixed``) if it interpolates, and ``final``. ``weights``
    is the folder of the final model. ``mixtures`` holds, for each stage with ``interpolate =
    "auto"``, its ``stage``, the ``weight`` that was chosen, whether the kept pairs lose at most a
    point of mean recall (``within``), and of every mixture its ``weight``, ``score`` and ``kept``.
    """

    folder: str
    weights: str
    steps: int
    seconds: float
    scores: list[tuple[str, float]]
    mixtures: list[dict[str, Any]] = field(default_factory=list)


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write what a run came to, which tells that it has ended."""
    with published(folder / _OUTCOME) as path:
        path.write_text(json.dumps(asdict(outcome), indent=2) + "\n", encoding="utf-8")


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Turn what cannot be written into the folder into one sentence."""
    try:
        yield
    except CNClipError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"the run in {folder} cannot go on: {error}; its last state is whole. Free some space, "
            "then go on with: --resume auto"
        ) from error


def locked(folder: Path) -> AbstractContextManager[object]:
    """Hold the folder for this run alone."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        return lock.acquire()
    except Timeout:
        raise UsageError(
            f"another process is training in {folder}; wait for it, or give another --output.folder"
        ) from None


def prepared(folder: Path, recipe: Recipe, resume: bool, allow_changes: bool) -> Outcome | None:
    """Check what is in the folder, write the recipe there; return the outcome of a run that ended.

    Raises:
        UsageError: it holds a run, and this is not to go on with it, or has another recipe.
    """
    return distributed.on_main(lambda: _looked_into(folder, recipe, resume, allow_changes))


def _looked_into(folder: Path, recipe: Recipe, resume: bool, allow_changes: bool) -> Outcome | None:
    path = folder / _RECIPE
    if path.is_file() and states(folder):
        if not resume:
            raise UsageError(
                f"{folder} holds a run; go on with it by --resume auto, or give another "
                "--output.folder"
            )
        changes = difference(from_toml(path.read_text(encoding="utf-8")), recipe)
        changes = [each for each in changes if not each.startswith(_FREE)]
        if changes and not allow_changes:
            raise UsageError(
                f"the recipe of the run in {folder} was another one: {'; '.join(changes)}. "
                "--allow-changes goes on all the same"
            )
        if (folder / _OUTCOME).is_file() and not changes:
            values = json.loads((folder / _OUTCOME).read_text(encoding="utf-8"))
            values["scores"] = [(name, value) for name, value in values["scores"]]
            return Outcome(**values)
    (folder / _OUTCOME).unlink(missing_ok=True)  # of the recipe before
    if not states(folder):  # what came of an earlier try is no part of this run
        (folder / "log.jsonl").unlink(missing_ok=True)
    _sweep(folder)
    with published(path) as new:
        new.write_text(recipe.to_toml(), encoding="utf-8")
    return None


def _sweep(folder: Path) -> None:
    """Remove what was half written when a run was killed."""
    features = (folder / "features").glob("*")
    for place in (folder, folder / "stages", folder / "states", *features):
        for path in place.glob(".*.*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
