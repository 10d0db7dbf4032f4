"""``cn-clip library``: the care of libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter
from rich.table import Table

from cn_clip.cli.library_options import DEFAULT, LibraryLoading
from cn_clip.cli.show import Flag, console, print_json, print_some, progress_bar
from cn_clip.errors import UsageError
from cn_clip.translation import N_, _, _n, translate

if TYPE_CHECKING:
    from cn_clip.search.folder import LibraryFolder
    from cn_clip.search.info import LibraryFacts
    from cn_clip.search.purge import Removal

_STATES = (N_("active"), N_("building"), N_("kept"))  # of models, as the database has them
library_app = App(name="library", help="Look after libraries: check, back up, merge, remove.")

Ids = Annotated[tuple[int, ...], Parameter(negative=(), show_default=False, consume_multiple=True)]


@library_app.command(name="list")
def list_(*, json: Flag = False) -> int:
    """List the named libraries.

    Parameters
    ----------
    json
        Print JSON instead of a table.
    """
    from cn_clip.search.info import all_named
    from cn_clip.search.places import libraries_folder
    from cn_clip.text import path_text

    found, folder = all_named(), path_text(libraries_folder())
    if json:
        print_json({"folder": folder, "libraries": [asdict(library) for library in found]})
        return 0
    if not found:
        print(_("no libraries in {folder}; make one with: cn-clip index PHOTOS", folder=folder))
        return 0
    table = Table(box=None, pad_edge=False)
    table.add_column(folder, overflow="fold")
    for name in (_("images"), _("MB")):
        table.add_column(name, justify="right")
    table.add_column(_("model"), overflow="fold")
    for each in found:
        table.add_row(
            each.name, f"{each.images:,}", _megabytes(each.size), each.error or each.model or ""
        )
    console().print(table)
    return 0


@library_app.command
def info(*, library: str = "default", json: Flag = False) -> int:
    """Show the folders, models, counts and sizes of a library.

    Parameters
    ----------
    library
        A name, or the path of a folder.
    json
        Print JSON instead of a table.
    """
    from cn_clip.search.info import library_facts

    with _opened(library) as folder:
        facts = library_facts(folder)
    if json:
        print_json(asdict(facts))
    else:
        _print_facts(facts)
    return 0


@library_app.command
def duplicates(*, library: str = "default", json: Flag = False) -> int:
    """List groups of images that look alike: equal files, resized and recompressed copies.

    Changes nothing. The largest image of a group comes first. Images whose embeddings were imported
    are read first.

    Parameters
    ----------
    library
        A name, or the path of a folder.
    json
        Print JSON instead of a list.
    """
    from cn_clip.search.duplicates import duplicates as find

    with _opened(library) as folder, progress_bar(_("reading files")) as on_progress:
        found = find(folder, on_progress)
    if json:
        print_json(asdict(found))
        return 0
    out = console()
    groups = found.groups
    for group in groups:
        for each in group:
            for path in each.paths:
                size = f"{each.width} x {each.height}"
                out.print(f"{each.id:>8}  {size:>13}  {path}", markup=False, soft_wrap=True)
        out.print()
    images = sum(len(each.paths) for group in groups for each in group)
    out.print(_("{groups:,} groups of {images:,} files", groups=len(groups), images=images))
    if found.not_compared:
        print(
            _n(
                "cn-clip: {count:,} image is not compared, as only its embedding was imported and "
                "its file cannot be read; connect its disk",
                "cn-clip: {count:,} images are not compared, as only their embeddings were "
                "imported and their files cannot be read; connect their disk",
                found.not_compared,
            ),
            file=sys.stderr,
        )
    return 0


@library_app.command
def verify(*, library: str = "default", all: Flag = False, json: Flag = False) -> int:
    """Check a library: database, vectors, thumbnails, and the content of some files.

    Changes nothing. The exit code is 1 if there is a problem.

    Parameters
    ----------
    library
        A name, or the path of a folder.
    all
        Read all files, not only a sample, and compare them with their digests.
    json
        Print JSON instead of sentences.
    """
    from cn_clip.search.verify import verify as check

    with _opened(library) as folder, progress_bar(_("reading files")) as on_progress:
        found = check(folder, all_files=all, on_progress=on_progress)
    if json:
        print_json(asdict(found))
        return 1 if found.problems else 0
    out = console()
    for problem in found.problems:
        out.print(
            _("{text}; remedy: {remedy}", text=problem.text, remedy=problem.remedy), markup=False
        )
    print(
        _(
            "{problems:,} problems; {images:,} images, {vectors:,} vectors and {files:,} files "
            "checked, {unreadable:,} files not at hand",
            problems=len(found.problems),
            images=found.images,
            vectors=found.vectors,
            files=found.files,
            unreadable=found.unreadable,
        )
    )
    return 1 if found.problems else 0


@library_app.command
def repair(*, library: str = "default", json: Flag = False) -> int:
    """Put right what `verify` finds, as far as it can be.

    Images whose vectors are lost are embedded again by the next `cn-clip index`. A damaged database
    is beyond repair: restore a backup, or index again.

    Parameters
    ----------
    library
        A name, or the path of a folder.
    json
        Print JSON instead of a sentence.
    """
    from cn_clip.search.repair import repair

    with _writing(library, "library repair") as folder:
        done = repair(folder)
    if json:
        print_json(asdict(done))
        return 0
    print(
        _(
            "{lost:,} lost vectors, {recounted:,} wrong counts, {thumbnails:,} orphan thumbnails "
            "put right",
            lost=done.lost_vectors,
            recounted=done.recounted,
            thumbnails=done.thumbnails,
        )
    )
    if done.lost_vectors:
        print(
            _("embed the lost ones again with: cn-clip index --library {library}", library=library)
        )
    return 0


@library_app.command
def compact(*, library: str = "default", json: Flag = False) -> int:
    """Remove images whose files are gone and the vectors of old models, and free their space.

    Ids stay as they are. Images on a disk that is not connected stay.

    Parameters
    ----------
    library
        A name, or the path of a folder.
    json
        Print JSON instead of a sentence.
    """
    from cn_clip.search.info import sizes
    from cn_clip.search.switching import compact

    with _writing(library, "library compact") as folder:
        before = sum(sizes(folder.path).values())
        done = compact(folder)
        after = sum(sizes(folder.path).values())
    if json:
        print_json(asdict(done) | {"bytes_before": before, "bytes_after": after})
        return 0
    print(
        _(
            "{images:,} images removed; {before} MB before, {after} MB after",
            images=done.images,
            before=_megabytes(before),
            after=_megabytes(after),
        )
    )
    return 0


@library_app.command
def backup(
    *,
    library: str = "default",
    out: str,
    no_thumbnails: Flag = False,
    overwrite: Flag = False,
    json: Flag = False,
) -> int:
    """Copy a library, while it is searched and indexed. The copy is a library.

    Parameters
    ----------
    library
        A name, or the path of a folder.
    out
        A new folder. To restore, give it as --library, or copy it back.
    no_thumbnails
        Leave out the thumbnails; they can be made again from the images.
    overwrite
        Replace OUT if this command wrote it.
    json
        Print JSON instead of a sentence.
    """
    from cn_clip.search.backup import back_up, claim_backup
    from cn_clip.search.places import library_path

    target = claim_backup(library_path(library), out, overwrite=overwrite)
    with _opened(library) as folder:
        images = back_up(folder, target, thumbnails=not no_thumbnails)
    if json:
        print_json({"out": out, "images": images})
    else:
        print(_("{images:,} images in {out}", images=images, out=out))
    return 0


@library_app.command
def merge(other: str, /, *, library: str = "default", json: Flag = False) -> int:
    """Take the images of another library of the same model into a library.

    Nothing is embedded: images that both have are found by their content. The other library stays
    as it is.

    Parameters
    ----------
    other
        The library to take over: a name, or the path of a folder.
    library
        The library that grows: a name, or the path of a folder.
    json
        Print JSON instead of a sentence.
    """
    from cn_clip.search.folder import LibraryFolder
    from cn_clip.search.merge import merge
    from cn_clip.search.places import library_path

    with (
        LibraryFolder(library_path(other)) as source,
        _writing(library, "library merge") as folder,
        progress_bar(_("merging")) as on_progress,
    ):
        done = merge(folder, source, on_progress=on_progress)
    if json:
        print_json(asdict(done))
    else:
        print(_("{images:,} new images and {files:,} files", images=done.images, files=done.files))
    return 0


@library_app.command(name="move-root")
def move_root(old: str, new: str, /, *, library: str = "default", json: Flag = False) -> int:
    """Tell a library that a folder or source has moved: another disk, another drive letter.

    Nothing is read again but the names of some files. Folders inside OLD move with it.

    Parameters
    ----------
    old
        The folder or source as it was indexed, see `cn-clip library info`; or a folder above it.
    new
        Where it is now.
    library
        A name, or the path of a folder.
    json
        Print JSON instead of sentences.
    """
    from cn_clip.search.moving import move_root

    with _writing(library, "library move-root") as folder:
        moves = move_root(folder, old, new)
    if json:
        print_json({"moves": [asdict(move) for move in moves]})
        return 0
    for move in moves:
        print(
            _(
                "{old} is now {new}; {found:,} of {checked:,} files looked for are there",
                old=move.old,
                new=move.new,
                found=move.found,
                checked=move.checked,
            )
        )
    return 0


@library_app.command
def remove(*paths: str, library: str = "default", images: Ids = (), json: Flag = False) -> int:
    """Remove images from a library for good: vectors, thumbnails, texts and facts.

    The image files themselves are not touched. No trace stays in the files of the library; backups
    and exports are not changed.

    Parameters
    ----------
    paths
        Folders or sources that were indexed, or folders and files in them.
    library
        A name, or the path of a folder.
    images
        Ids of images, from a search.
    json
        Print JSON instead of sentences.
    """
    from cn_clip.search.purge import remove_images, remove_paths

    if bool(paths) == bool(images):
        raise UsageError(
            _("give what to remove: folders, sources or files, or --images with their ids")
        )
    with _writing(library, "library remove") as folder:
        done = remove_images(folder, images) if images else remove_paths(folder, paths)
    if json:
        print_json(asdict(done))
    else:
        _print_removal(done)
    return 0


@library_app.command
def switch(model: str, /, *, library: str = "default", json: Flag = False) -> int:
    """Search with another model whose vectors the library has kept.

    Parameters
    ----------
    model
        Its name, id, or the start of its fingerprint, see `cn-clip library info`.
    library
        A name, or the path of a folder.
    json
        Print JSON instead of a sentence.
    """
    from cn_clip.search.switching import switch_to

    with _writing(library, "library switch") as folder:
        now = switch_to(folder, model)
    if json:
        print_json({"model": now.name, "id": now.id, "fingerprint": now.fingerprint})
    else:
        print(
            _(
                "searches use {model} ({fingerprint:.8})",
                model=now.name,
                fingerprint=now.fingerprint,
            )
        )
    return 0


@library_app.command
def export(
    *,
    library: str = "default",
    to: Literal["clip-retrieval", "npz", "parquet", "milvus", "pgvector"],
    out: str,
    collection: str = "cn_clip",
    overwrite: Flag = False,
    update: Flag = False,
    json: Flag = False,
) -> int:
    """Write the vectors and facts of all searchable images for other programs.

    Parameters
    ----------
    library
        A name, or the path of a folder; for milvus and pgvector also embedding shards.
    to
        clip-retrieval (a folder), npz or parquet (a file), milvus or pgvector (a server).
    out
        The folder, X.npz, X.parquet; for milvus an address such as http://localhost:19530, with the
        token in MILVUS_TOKEN, or X.db for milvus-lite; for pgvector postgresql://user@host/name,
        with the password in PGPASSWORD.
    collection
        Of milvus; the table of pgvector.
    overwrite
        Replace OUT, or the collection, if this command wrote it.
    update
        Write all images into a collection that this command wrote, each under its id.
    json
        Print JSON instead of a sentence.
    """
    from cn_clip.search.export import claim_database, claim_export, export, is_database
    from cn_clip.search.export_rows import Existing
    from cn_clip.search.places import is_shard_folder, library_path

    path = library_path(library)
    if update and not is_database(to):
        raise UsageError(_("--update is for milvus and pgvector; give --overwrite"))
    if is_database(to) and is_shard_folder(path):
        from cn_clip.shards.export import export_shards

        claim_database(to, out)
        with progress_bar(_("exporting")) as on_progress:
            images = export_shards(
                path, to, out, collection, Existing(overwrite, update), on_progress
            )
    else:
        target = claim_export(path, to, out, overwrite=overwrite)
        with _opened(library) as folder, progress_bar(_("exporting")) as on_progress:
            images = export(
                folder,
                to,
                target,
                collection=collection,
                overwrite=overwrite,
                update=update,
                on_progress=on_progress,
            )
    if json:
        print_json({"out": out, "to": to, "images": images})
    else:
        print(_("{images:,} images in {out}", images=images, out=out))
    return 0


@library_app.command(name="import")
def import_(
    embeddings: str,
    /,
    *,
    library: str,
    base: str | None = None,
    loading: LibraryLoading = DEFAULT,
    json: Flag = False,
) -> int:
    """Make a library of embeddings that `cn-clip embed images` or clip-retrieval wrote.

    The vectors are copied, nothing is embedded. The image files are read once for their facts,
    where they exist.

    Parameters
    ----------
    embeddings
        X.npz, X.jsonl, or a folder in clip-retrieval's layout.
    library
        A new library: a name, or the path of a folder.
    base
        Folder of relative paths in the embeddings, by default the current one.
    json
        Print JSON instead of a sentence.
    """
    from cn_clip.files import as_path
    from cn_clip.search.folder import LibraryFolder, create
    from cn_clip.search.imports import import_embeddings
    from cn_clip.search.places import library_path

    path = as_path(embeddings)
    if not path.exists():
        raise UsageError(_("no embeddings at {path}", path=path))
    create(library_path(library))
    with (
        LibraryFolder(library_path(library), writable=True) as folder,
        folder.writing("library import"),
        progress_bar(_("reading files")) as on_progress,
    ):
        done = import_embeddings(
            folder,
            path,
            loading.load_named,
            model=loading.model,
            base=None if base is None else Path(base),
            on_progress=on_progress,
        )
    if json:
        print_json(asdict(done))
        return 0
    print(
        _(
            "{images:,} images imported, {files:,} of them with a file here; {changed:,} files "
            "changed since, which cn-clip index embeds again",
            images=done.images,
            files=done.files,
            changed=done.changed,
        )
    )
    return 0


@contextmanager
def _opened(name: str) -> Iterator[LibraryFolder]:
    from cn_clip.search.folder import LibraryFolder
    from cn_clip.search.places import library_path

    with LibraryFolder(library_path(name)) as folder:
        yield folder


@contextmanager
def _writing(name: str, task: str) -> Iterator[LibraryFolder]:
    from cn_clip.search.folder import LibraryFolder
    from cn_clip.search.places import library_path

    with LibraryFolder(library_path(name), writable=True) as folder, folder.writing(task):
        yield folder


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def _print_facts(facts: LibraryFacts) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    rows = [
        (_("folder"), facts.path),
        (
            _("images"),
            _(
                "{images:,}, {hidden:,} more whose files are gone",
                images=facts.images,
                hidden=facts.hidden,
            ),
        ),
        (
            _("files"),
            _("{files:,}, {failed:,} of them unreadable", files=facts.files, failed=facts.failed),
        ),
        (_("without a vector"), f"{facts.missing:,}"),
        (_("removed for good"), f"{facts.removed:,}"),
        (_("with text"), f"{facts.with_text:,}"),
        (_("journal"), facts.journal),
        (
            _("size"),
            _(", ").join(
                f"{translate(name)} {_megabytes(size)} MB" for name, size in facts.sizes.items()
            ),
        ),
    ]
    for root in facts.roots:
        state = _(", not there now") if root.exists is False else ""
        rows.append(
            (
                _("indexed"),
                _(
                    "{location}: {files:,} files{state}",
                    location=root.location,
                    files=root.files,
                    state=state,
                ),
            )
        )
    for model in facts.models:
        rows.append(
            (
                _("model {id}", id=model.id),
                _(
                    "{name} ({fingerprint:.8}), {precision}, {rows:,} vectors, {state}",
                    name=model.name,
                    fingerprint=model.fingerprint,
                    precision=model.precision,
                    rows=model.rows,
                    state=translate(model.state),
                ),
            )
        )
    for name, value in rows:
        table.add_row(name, value)
    console().print(table, markup=False)


def _print_removal(done: Removal) -> None:
    print(_("{images:,} images and {files:,} files removed", images=done.images, files=done.files))
    if done.on_disk:
        count = _(
            "{count:,} of these files still exist, and the next cn-clip index adds them again; "
            "delete them, or give --exclude",
            count=len(done.on_disk),
        )
        print_some([count], "")
    if not done.is_erased:
        print_some(
            [
                _(
                    "another process reads the library, so traces stay in its database until the "
                    "next cn-clip index"
                )
            ],
            "",
        )
