"""The folder of a run: its lock, its recipe, and its outcome."""

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
from cn_clip.outputs import STAMP, claim, own_folder, same_file, stamp, stamped_files
from cn_clip.publish import LOCK, atomic_file, map_write_errors, sweep
from cn_clip.train.batches.feature_cache import FEATURES
from cn_clip.train.recipe.schema import Recipe
from cn_clip.train.recipe.toml import build_recipe, difference, read_recipe
from cn_clip.train.run.checkpoint import states
from cn_clip.translation import _

# Options that may change between a run and its resumption: they do not affect the weights.
_FREE = (
    "data.workers", "data.prefetch_mb", "output.folder", "output.keep", "output.log_every",
    "output.save_every", "output.tensorboard", "output.swanlab", "output.wandb",
)  # fmt: skip
_RECIPE, _OUTCOME = "recipe.toml", "outcome.json"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a finished run.

    Attributes:
        folder: the run's folder.
        weights: folder of the final model.
        steps: steps of all stages.
        seconds: duration since the last start or resume.
        scores: (name, mean recall): ``before``, the best of each stage, its interpolated weights
            (``NAME, mixed``), and ``final``.
        mixtures: for each stage with ``interpolate = "auto"``: ``stage``, chosen ``weight``,
            whether the kept pairs lose at most one point of mean recall (``within``), and the
            ``weight``, ``score`` and ``kept`` of every mixture.
    """

    folder: str
    weights: str
    steps: int
    seconds: float
    scores: list[tuple[str, float]]
    mixtures: list[dict[str, Any]] = field(default_factory=list)


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write the outcome, which marks the run as finished."""
    with atomic_file(folder / _OUTCOME) as path:
        path.write_text(json.dumps(asdict(outcome), indent=2) + "\n", encoding="utf-8")


@contextmanager
def disk_errors_named(folder: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the run into a ``CheckpointError`` that names the folder."""
    try:
        yield
    except CNClipError:
        raise
    except OSError as error:
        raise CheckpointError(
            _(
                "the run in {folder} cannot go on: {error}; its last state is complete. Free some "
                "space, then resume with: --resume auto",
                folder=folder,
                error=error,
            )
        ) from error


def claim_folders(recipe: Recipe, inputs: Iterable[str | Path] = ()) -> None:
    """Check that a run may write into its folder, and into that of cached features, without
    changing them.

    A folder is new, empty, or of an earlier run; a new run never starts among other files.

    Args:
        recipe: the run's recipe.
        inputs: other files that are read, such as the file of the recipe.

    Raises:
        UsageError: see ``outputs.claim``.
    """
    folder = Path(recipe.output.folder).expanduser()
    read = [*_inputs(recipe), *(Path(path).expanduser() for path in inputs)]
    if _is_run(folder):  # its own recipe may be an input
        read = [path for path in read if not same_file(path, folder / _RECIPE)]
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
                _(
                    "--output.features {features} contains the run's folder {folder}; give a "
                    "separate folder",
                    features=features,
                    folder=folder,
                )
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
    """Return the files and folders that a recipe reads."""
    start, losses = recipe.start, [stage.loss for stage in recipe.stages]
    inputs = [start.model, start.checkpoint, start.image, start.text]
    inputs += [path for loss in losses for path in (loss.teacher, loss.text_targets)]
    names = hub.names()
    files = [Path(path) for path in inputs if path is not None and path not in names]
    sources = (value for value in asdict(recipe.data).values() if isinstance(value, tuple))
    return files + [path for uris in sources for uri in uris for path in paths_of(uri)]


def _is_run(folder: Path) -> bool:
    """Return whether a folder has a run."""
    if not os.path.isdir(folder):  # missing, or an invalid name, which ``claim`` reports
        return False
    return STAMP in stamped_files(folder, "train") or bool(states(folder))


def _objection(folder: Path) -> str | None:
    """Return why a run may not start in a folder: it has other files, and no run."""
    return None if _is_run(folder) else own_folder("train")(folder)


def lock_folder(folder: Path) -> AbstractContextManager[object]:
    """Create the folder and lock it for this run.

    Raises:
        UsageError: another run has the lock, or the folder cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / LOCK, timeout=0).acquire()
    except Timeout:
        raise UsageError(
            _(
                "another process is training in {folder}; wait for it, or give another "
                "--output.folder",
                folder=folder,
            )
        ) from None
    except (FileExistsError, NotADirectoryError):
        raise UsageError(
            _(
                "output.folder is {folder}, which is a file; give another --output.folder",
                folder=folder,
            )
        ) from None
    except OSError as error:
        raise UsageError(
            _(
                "output.folder is {folder}, which cannot be written ({reason}); give another "
                "--output.folder",
                folder=folder,
                reason=error.strerror,
            )
        ) from None


def prepare_folder(
    folder: Path, recipe: Recipe, resume: bool, allow_changes: bool
) -> Outcome | None:
    """Check the folder and write the recipe into it; return the outcome if the run is finished.

    Raises:
        UsageError: the folder has a run, and ``resume`` is false or its recipe differs; or it has
            other files.
    """

    def prepare() -> Outcome | None:
        with map_write_errors(folder):
            return _prepare_folder(folder, recipe, resume, allow_changes)

    return distributed.on_main(prepare)


def _prepare_folder(
    folder: Path, recipe: Recipe, resume: bool, allow_changes: bool
) -> Outcome | None:
    path, reason = folder / _RECIPE, _objection(folder)
    if reason is not None:
        raise UsageError(_("{folder} {reason}; give another place", folder=folder, reason=reason))
    if path.is_file() and states(folder):
        if not resume:
            raise UsageError(
                _(
                    "{folder} has a run; resume it with --resume auto, or give another "
                    "--output.folder",
                    folder=folder,
                )
            )
        changes = difference(build_recipe(read_recipe(str(path))), recipe)
        changes = [change for change in changes if not change.startswith(_FREE)]
        if changes and not allow_changes:
            raise UsageError(
                _(
                    "the recipe of the run in {folder} differs: {changes}. --allow-changes "
                    "resumes it with the new recipe",
                    folder=folder,
                    changes="; ".join(changes),
                )
            )
        if not changes and (outcome := _read_outcome(folder)) is not None:
            return outcome
    _sweep(folder)
    for path_of_weights in (folder / "final", *(folder / "stages").glob("[0-9]*")):
        weights.refuse_foreign_folder(path_of_weights)  # fail now, not at the end of the run
    if not _is_run(folder):
        stamp(folder, "train")
    (folder / _OUTCOME).unlink(missing_ok=True)  # of an earlier recipe
    if not states(folder):  # the log of an attempt that saved no state
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
    """Return the outcome of a finished run; None if the file is missing or damaged, so that the end
    of the run is repeated."""
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
    """Remove partial files of a killed run."""
    features = (folder / "features").glob("*")
    for path in (folder, folder / "stages", folder / "states", *features):
        sweep(path)
