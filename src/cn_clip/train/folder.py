"""A run's folder: who may train in it, which recipe it is of, and whether it has ended."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from cn_clip import distributed
from cn_clip.errors import UsageError
from cn_clip.publish import published
from cn_clip.train.checkpoint import states
from cn_clip.train.reading import difference, from_toml
from cn_clip.train.recipe import Recipe

_RECIPE, _OUTCOME = "recipe.toml", "outcome.json"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    ``scores`` holds, in order, where each was measured and the mean recall there: ``before``, the
    best of each stage, and ``final``. ``weights`` is the folder of the final model.
    """

    folder: str
    weights: str
    steps: int
    seconds: float
    scores: list[tuple[str, float]]


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write what a run came to, which tells that it has ended."""
    with published(folder / _OUTCOME) as path:
        path.write_text(json.dumps(asdict(outcome), indent=2) + "\n", encoding="utf-8")


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
    with published(path) as new:
        new.write_text(recipe.to_toml(), encoding="utf-8")
    return None
