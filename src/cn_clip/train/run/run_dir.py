"""A run's folder: who may train in it, which recipe it is of, and whether it has ended."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cn_clip import distributed, hub, weights
from cn_clip.data.sources.open import paths_of
from cn_clip.errors import CheckpointError, CNClipError, UsageError
from cn_clip.outputs import LOCK, STAMP, claim, own_folder, same_file, stamp, stamped_files
from cn_clip.publish import atomic_file, map_write_errors, sweep
from cn_clip.train.batches.feature_cache import FEATURES
from cn_clip.train.recipe.schema import Recipe
from cn_clip.train.recipe.toml import build_recipe, difference, read_recipe
from cn_clip.train.run.checkpoint import states

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
    with atomic_file(folder / _OUTCOME) as path:
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


def claim_folders(recipe: Recipe, inputs: Iterable[str | Path] = ()) -> None:
    """Check that a run may write into its folder, and into that of cached features; nothing is
    touched.

    A folder is new, empty, or of a run before: a first run never begins among other files.

    Args:
        recipe: of the run.
        inputs: what is read besides, such as the file of the recipe.

    Raises:
        UsageError: see ``outputs.claim``.
    """
    folder = Path(recipe.output.folder).expanduser()
    read = [*_inputs(recipe), *(Path(each).expanduser() for each in inputs)]
    if _is_run(folder):  # whose own recipe may be what is carried out
        read = [each for each in read if not same_file(each, folder / _RECIPE)]
    claim(
        recipe.output.folder and folder,
        _objection,
        kind="folder",
        option="--output.folder",
        inputs=read,
        in_place=True,
    )
    if recipe.output.features is not None:
        features = Path(recipe.output.features).expanduser()
        if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(features)):
            raise UsageError(
                f"--output.features {features} holds the run's folder {folder}; give a folder of "
                "its own"
            )
        claim(
            recipe.output.features and features,
            FEATURES,
            kind="folder",
            option="--output.features",
            inputs=read,
            in_place=True,
        )


def _inputs(recipe: Recipe) -> list[Path]:
    """Return the files and folders that a recipe names."""
    start, losses = recipe.start, [stage.loss for stage in recipe.stages]
    given = [start.model, start.checkpoint, start.image, start.text]
    given += [each for loss in losses for each in (loss.teacher, loss.sentences)]
    names = hub.names()
    files = [Path(each) for each in given if each is not None and each not in names]
    listed = (value for value in asdict(recipe.data).values() if isinstance(value, tuple))
    return files + [path for uris in listed for uri in uris for path in paths_of(uri)]


def _is_run(folder: Path) -> bool:
    """Tell whether a run has begun in a folder."""
    if not os.path.isdir(folder):  # nothing, or no usable name, which the claim says
        return False
    return STAMP in stamped_files(folder, "train") or bool(states(folder))


def _objection(folder: Path) -> str | None:
    """What stands beside a run is left alone; but none begins beside anything."""
    return None if _is_run(folder) else own_folder("train")(folder)


def locked(folder: Path) -> AbstractContextManager[object]:
    """Hold the folder for this run alone.

    Raises:
        UsageError: another run does, or it cannot be a folder: there is a file, say.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / LOCK, timeout=0).acquire()
    except Timeout:
        raise UsageError(
            f"another process is training in {folder}; wait for it, or give another --output.folder"
        ) from None
    except (FileExistsError, NotADirectoryError):
        raise UsageError(
            f"output.folder is {folder}, where there is a file; give another --output.folder"
        ) from None
    except OSError as error:
        raise UsageError(
            f"output.folder is {folder}, which cannot be written ({error.strerror}); give another "
            "--output.folder"
        ) from None


def prepared(folder: Path, recipe: Recipe, resume: bool, allow_changes: bool) -> Outcome | None:
    """Check what is in the folder, write the recipe there; return the outcome of a run that ended.

    Raises:
        UsageError: it holds a run, and this is not to go on with it, or has another recipe; or it
            holds other files.
    """

    def look() -> Outcome | None:
        with map_write_errors(folder):
            return _looked_into(folder, recipe, resume, allow_changes)

    return distributed.on_main(look)


def _looked_into(folder: Path, recipe: Recipe, resume: bool, allow_changes: bool) -> Outcome | None:
    path, reason = folder / _RECIPE, _objection(folder)
    if reason is not None:
        raise UsageError(f"{folder} {reason}; give another place")
    if path.is_file() and states(folder):
        if not resume:
            raise UsageError(
                f"{folder} holds a run; go on with it by --resume auto, or give another "
                "--output.folder"
            )
        changes = difference(build_recipe(read_recipe(str(path))), recipe)
        changes = [each for each in changes if not each.startswith(_FREE)]
        if changes and not allow_changes:
            raise UsageError(
                f"the recipe of the run in {folder} was another one: {'; '.join(changes)}. "
                "--allow-changes goes on all the same"
            )
        if not changes and (outcome := _read_outcome(folder)) is not None:
            return outcome
    _sweep(folder)
    for place in (folder / "final", *(folder / "stages").glob("[0-9]*")):
        weights.refuse_foreign_folder(place)  # now, and not when the run has ended
    if not _is_run(folder):
        stamp(folder, "train")
    (folder / _OUTCOME).unlink(missing_ok=True)  # of the recipe before
    if not states(folder):  # what came of an earlier try is no part of this run
        (folder / "log.jsonl").unlink(missing_ok=True)
    if not _is_written(path, recipe):
        with atomic_file(path) as new:
            new.write_text(recipe.to_toml(), encoding="utf-8")
    return None


def _is_written(path: Path, recipe: Recipe) -> bool:
    """Tell whether a file holds a recipe already, perhaps with comments, which are to stay."""
    try:
        return not difference(build_recipe(read_recipe(str(path))), recipe)
    except CNClipError:  # there is none, or it is damaged
        return False


def _read_outcome(folder: Path) -> Outcome | None:
    """Return the outcome of a run that has ended; None if the file is missing or damaged, so that
    the run's end is done again."""
    try:
        values = json.loads((folder / _OUTCOME).read_text(encoding="utf-8"))
        scores = [(str(name), float(value)) for name, value in values["scores"]]
        return Outcome(
            str(values["folder"]),
            str(values["weights"]),
            int(values["steps"]),
            float(values["seconds"]),
            scores,
            [dict(each) for each in values.get("mixtures", ())],  # none in those written before
        )
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def _sweep(folder: Path) -> None:
    """Remove what was half written when a run was killed."""
    features = (folder / "features").glob("*")
    for place in (folder, folder / "stages", folder / "states", *features):
        sweep(place)
