"""Which of its models a library uses, and the space that the others take."""

from __future__ import annotations

from cn_clip.errors import UsageError
from cn_clip.search.folder import LibraryFolder, StoredModel
from cn_clip.search.migration import remove_model, remove_unused_vectors, switch
from cn_clip.search.purge import Removal, remove_absent, rewrite
from cn_clip.translation import _

_WORTH = 1 << 16  # bytes that a new vector file must save


def switch_to(library: LibraryFolder, wanted: str) -> StoredModel:
    """Search with another model that the library keeps; return it.

    Args:
        library: opened for writing, locked by ``LibraryFolder.writing``.
        wanted: its name, id, or the start of its fingerprint.

    Raises:
        UsageError: there is no such model, or it lacks images that were added since.
    """
    models = library.models()
    found = [
        model
        for model in models
        if wanted in (model.name, str(model.id))
        or (len(wanted) >= 4 and model.fingerprint.startswith(wanted))
    ]
    if len(found) > 1:
        found = [model for model in found if str(model.id) == wanted]
    if not found:
        names = ", ".join(f"{model.id} ({model.name})" for model in models)
        raise UsageError(
            _(
                "{wanted!r} is no model of this library; give one of {names}",
                wanted=wanted,
                names=names,
            )
        )
    (model,) = found
    active = library.active_model()
    if active is not None and model.rows < active.rows:
        raise UsageError(
            _(
                "{name} has no vectors of {count:,} images that were added since; embed them with: "
                "cn-clip index --model {name}",
                name=model.name,
                count=active.rows - model.rows,
            )
        )
    if model.state != "active":
        switch(library, model)
    return model


def compact(library: LibraryFolder) -> Removal:
    """Remove images without a file and the vectors of kept models, and free their space.

    Ids stay as they are: a removed row stays in the vector file, as zeros that take no disk space
    on file systems that can leave them out.

    Args:
        library: opened for writing, locked by ``LibraryFolder.writing``.

    Raises:
        CNClipError: the disk is full; the library is as before, or smaller.
    """
    removed = remove_absent(library)
    active = library.active_model()
    for model in library.models():
        # A model of this fingerprint that is being built is an interrupted `_shrink`.
        rest = active is not None and model.fingerprint == active.fingerprint
        if model.state == "kept" or (model.state == "building" and rest):
            remove_model(library, model)
    remove_unused_vectors(library)
    if active is not None:
        _shrink(library, active)
    rewrite(library)
    return removed


def _shrink(library: LibraryFolder, model: StoredModel) -> None:
    """Copy the vectors to a new file without the space of removed rows, and use it from now on."""
    old_file = library.vector_file(model)
    if old_file.used(model.rows) + _WORTH > old_file.allocated():
        return
    with library.database.transaction() as connection:
        columns = (
            "name, fingerprint, derived_from, precision, fast_decode, dim, logit_scale, created"
        )
        cursor = connection.execute(
            f"INSERT INTO models ({columns}, state) SELECT {columns}, 'building' FROM models "
            "WHERE id = ?",
            (model.id,),
        )
        number = cursor.lastrowid
    new = next(each for each in library.models() if each.id == number)
    old_file.copy_to(library.vector_file(new), model.rows)
    with library.database.transaction() as connection:
        connection.execute("UPDATE models SET rows = ? WHERE id = ?", (model.rows, new.id))
        connection.execute(
            "INSERT INTO missing SELECT ?, image FROM missing WHERE model = ?", (new.id, model.id)
        )
        connection.execute("UPDATE models SET state = 'kept' WHERE id = ?", (model.id,))
        connection.execute("UPDATE models SET state = 'active' WHERE id = ?", (new.id,))
    remove_model(library, model)
