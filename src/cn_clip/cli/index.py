"""``cn-clip index``: add folders and sources of images to a library."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from cn_clip.cli.library_options import DEFAULT, LibraryLoading
from cn_clip.cli.show import Flag, console, print_json, print_some, progress
from cn_clip.text import path_text
from cn_clip.translation import _, _n

if TYPE_CHECKING:
    from cn_clip.search.indexing import Progress
    from cn_clip.search.migration import Migration
    from cn_clip.search.ocr import TextReader
    from cn_clip.search.text_index import TextProgress
    from cn_clip.search.updating import Update

Globs = Annotated[tuple[str, ...], Parameter(negative=(), show_default=False)]


def index(
    *sources: str,
    library: str = "default",
    include: Globs = (),
    exclude: Globs = (),
    hidden: Flag = False,
    no_thumbnails: Flag = False,
    ocr: Flag = False,
    watch: Flag = False,
    drop_old: Flag = False,
    without_unreadable: Flag = False,
    loading: LibraryLoading = DEFAULT,
    json: Flag = False,
) -> int:
    """Add images to a library, and bring it up to date.

    Only new and changed files are read; moved files and copies are not embedded again. Files that
    are gone are hidden, and shown again when they return. After an interruption, the same command
    resumes. Unreadable images are listed; the exit code is then 1.

    With another --model than before, all images are embedded again. Until that is done, searches
    use the old embeddings.

    Parameters
    ----------
    sources
        Folders (searched recursively), or sources of image-text pairs: KIND:PATH with KIND csv,
        jsonl, parquet, tsv, lmdb, tar or folder. Without any, all that were indexed before.
    library
        A name, or the path of a folder.
    include
        Glob of files to index: `*.jpg` or `2024/*`; repeat for several.
    exclude
        Glob of files or folders to skip; repeat for several.
    hidden
        Include files and folders whose names begin with a dot.
    no_thumbnails
        Make no thumbnails.
    ocr
        Recognise the text in the images, so that searches find it too. Needs the extra ocr. Images
        are read once; about as slow as embedding with a large model.
    watch
        Go on, and index changes of the folders as they happen, until Ctrl-C.
    drop_old
        Delete the embeddings of the old model after a change of --model.
    without_unreadable
        Change to another --model even if some images cannot be read now; these are not shown.
    json
        Print JSON instead of sentences; with --watch, one line of it after each change.
    """
    from cn_clip.search.places import library_path
    from cn_clip.search.text_index import index_text
    from cn_clip.search.updating import open_for_update, roots_to_update, update
    from cn_clip.search.watching import changes_of, check_watchfiles

    if watch:
        check_watchfiles()
    reader = _text_reader() if ocr else None
    with open_for_update(library_path(library), sources, model=loading.model) as folder:
        roots = roots_to_update(folder, sources, include=include, exclude=exclude, hidden=hidden)

        def run() -> int:
            with folder.writing("index", wait=watch), _Bars() as bars:
                done = update(
                    folder,
                    roots,
                    loading.load_named,
                    load_own=loading.load_own,
                    model=loading.model,
                    thumbnails=not no_thumbnails,
                    keep_old=not drop_old,
                    without_unreadable=without_unreadable,
                    on_progress=bars.show_progress,
                    on_migration=bars.show_migration,
                )
                texts = None
                if reader is not None:
                    texts = index_text(folder, reader, on_progress=bars.show_texts)
            if json:
                _print_json(path_text(folder.path), done, texts, one_line=watch)
            else:
                _print(path_text(folder.path), done, texts)
            failed = done.progress.failed or done.progress.unreadable
            return 1 if failed or _is_unfinished(done) or not done.progress.files else 0

        if not watch:
            return run()
        for _unused in changes_of(roots, folder.path):
            run()  # which says what failed
        return 0


class _Bars:
    """Progress of an index run on stderr."""

    def __init__(self) -> None:
        self._progress = progress()
        self._task = self._progress.add_task(_("listing files"), total=None)

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_unused: object) -> None:
        self._progress.stop()

    def show_progress(self, state: Progress) -> None:
        if state.total is None:
            self._progress.update(self._task, description=_("listing files"))
            return
        self._progress.update(
            self._task,
            total=state.total,
            completed=state.done,
            description=_("indexing, {rate:,.0f} per second", rate=state.rate),
        )

    def show_texts(self, state: TextProgress) -> None:
        self._progress.update(
            self._task,
            total=state.total,
            completed=state.done,
            description=_("reading the text in images"),
        )

    def show_migration(self, state: Migration) -> None:
        self._progress.update(
            self._task,
            total=state.total,
            completed=state.done,
            description=_("embedding with the new model"),
        )


def _text_reader() -> TextReader:
    from cn_clip.search.ocr import TextReader

    return TextReader()


def _is_unfinished(done: Update) -> bool:
    return done.migration is not None and not done.migration.switched


def _print_skipped(skipped: dict[str, int]) -> None:
    counts = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(skipped.items()))
    print(
        _n(
            "cn-clip: {count:,} image of another format is skipped ({counts}); {remedy}",
            "cn-clip: {count:,} images of other formats are skipped ({counts}); {remedy}",
            sum(skipped.values()),
            counts=counts,
            remedy=_("pip install pillow-heif for HEIC, or convert them to JPEG")
            if skipped.keys() & {".heic", ".heif", ".hif"}
            else _("convert them to JPEG"),
        ),
        file=sys.stderr,
    )


def _print_json(library: str, done: Update, texts: TextProgress | None, *, one_line: bool) -> None:
    state, migration = done.progress, done.migration
    _print_problems(done, texts)
    values: dict[str, Any] = {"library": library, "model": done.model}
    values |= asdict(state) | {"rate": round(state.rate, 1)}
    values["failed"] = [{"path": path, "error": reason} for path, reason in state.failed]
    values["texts"] = None if texts is None else asdict(texts)
    values["migration"] = None if migration is None else asdict(migration)
    print_json(values, one_line=one_line)


def _print_problems(done: Update, texts: TextProgress | None) -> None:
    """Print on stderr what could not be read."""
    state, migration = done.progress, done.migration
    failed = [
        f"{path}: {reason}" if path not in reason else reason for path, reason in state.failed
    ]
    failed += [] if texts is None else texts.failed
    print_some([*state.unreadable, *failed], _("--json lists all"))
    if state.skipped:
        _print_skipped(state.skipped)
    if migration is not None and not migration.switched:
        print_some(migration.unreadable, _("--json lists all"))
        print(
            _(
                "cn-clip: {count:,} images cannot be read now, so searches still use the old "
                "model; connect their disk and run the same command again, or give "
                "--without-unreadable",
                count=len(migration.unreadable),
            ),
            file=sys.stderr,
        )
    if not (state.files or state.unreadable):
        from cn_clip.image.decode import SUFFIXES

        print(
            _(
                "cn-clip: no image was found; files end in {suffixes}, and names that begin with a "
                "dot need --hidden",
                suffixes=", ".join(SUFFIXES),
            ),
            file=sys.stderr,
        )


def _print(library: str, done: Update, texts: TextProgress | None) -> None:
    state = done.progress
    _print_problems(done, texts)
    parts = [
        _("{count:,} new", count=state.new),
        _("{count:,} changed", count=state.changed),
        _("{count:,} unchanged", count=state.unchanged),
    ]
    optional = {
        _("{count:,} deleted", count=state.deleted): state.deleted,
        _("{count:,} returned", count=state.returned): state.returned,
        _("{count:,} unreadable as before", count=state.known_failures): state.known_failures,
        _("{count:,} unreadable", count=len(state.failed)): len(state.failed),
    }
    parts += [part for part, count in optional.items() if count]
    if texts is not None:
        parts.append(
            _(
                "text in {with_text:,} of {done:,} images",
                with_text=texts.with_text,
                done=texts.done,
            )
        )
    console().print(
        _(
            "{library}: {counts}; {embedded:,} images embedded in {seconds:,.1f} s",
            library=library,
            counts=", ".join(parts),
            embedded=state.embedded,
            seconds=state.seconds,
        ),
        markup=False,
    )
