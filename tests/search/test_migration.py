"""Another model for a library: while it is embedded, interrupted, and switched to."""

import os
import sqlite3

import numpy as np
import pytest
from search.libraries import embedder, index, jpeg, opened, photos, problems, same, vectors_of

from cn_clip.errors import UsageError
from cn_clip.search.migration import switch
from cn_clip.search.reading import digest_of
from cn_clip.search.switching import compact, switch_to


@pytest.fixture
def album(tmp_path):
    return photos(tmp_path / "album", range(12))


@pytest.fixture
def library(tmp_path, album):
    index(tmp_path / "library", album)
    return tmp_path / "library"


def fresh(tmp_path, album, model):
    index(tmp_path / f"fresh-{model}", album, model=model)
    return vectors_of(tmp_path / f"fresh-{model}")


def active(library):
    with opened(library) as folder:
        return folder.active_model()


def switched(library, wanted):
    with opened(library, writable=True) as folder, folder.writing("library switch"):
        return switch_to(folder, wanted)


def test_a_new_model_embeds_everything_and_keeps_the_old_vectors(library, album, tmp_path):
    old = vectors_of(library)
    done = index(library, model="new")
    assert done.migration.switched and done.migration.done == 12
    assert active(library).name == "new" and problems(library) == []
    assert same(vectors_of(library), fresh(tmp_path, album, "new"))
    assert not same(vectors_of(library), old)
    assert switched(library, "tiny").name == "tiny"
    assert same(vectors_of(library), old)
    assert switched(library, active(library).fingerprint[:6]).name == "tiny"
    with pytest.raises(UsageError, match=r"no model of this library.*\(new\)"):
        switched(library, "nothing")


def test_the_old_vectors_are_dropped_when_told(library, tmp_path):
    index(library, model="new", keep_old=False)
    assert [path.name for path in library.glob("*.f16")] == ["vectors-2.f16"]


def test_searches_use_the_old_vectors_until_the_switch(library, monkeypatch):
    monkeypatch.setattr("cn_clip.search.migration.COMMIT_IMAGES", 4)
    old, seen = vectors_of(library), []
    index(library, model="new", on_migration=lambda state: seen.append(vectors_of(library)))
    assert len(seen) >= 3 and all(same(each, old) for each in seen)
    assert not same(vectors_of(library), old)


def test_the_switch_is_one_transaction(library):
    index(library, model="new")
    with opened(library, writable=True) as writer, opened(library) as reader:
        old = writer.models()[0]
        writer.database.connection.execute(
            "CREATE TEMP TRIGGER killed BEFORE UPDATE OF state ON models "
            "WHEN NEW.state = 'active' BEGIN SELECT RAISE(ABORT, 'killed'); END"
        )
        with pytest.raises(sqlite3.IntegrityError, match="killed"):
            switch(writer, old)
        assert reader.active_model().name == "new"
        writer.database.connection.execute("DROP TRIGGER killed")
        switch(writer, old)
        assert reader.active_model().name == "tiny"


def test_an_interrupted_migration_goes_on(library, album, tmp_path, monkeypatch):
    monkeypatch.setattr("cn_clip.search.migration.COMMIT_IMAGES", 4)
    old = vectors_of(library)

    def interrupt(state):
        if state.done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index(library, model="new", on_migration=interrupt)
    assert same(vectors_of(library), old) and active(library).name == "tiny"
    photos(album, range(20, 23))  # the old model goes on meanwhile
    index(library)
    states = []
    done = index(library, model="new", on_migration=lambda state: states.append(state.done))
    assert done.migration.switched and min(states) > 4
    assert same(vectors_of(library), fresh(tmp_path, album, "new")) and problems(library) == []


def test_a_third_model_replaces_an_unfinished_one(library, album, tmp_path, monkeypatch):
    def interrupt(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index(library, model="new", on_migration=interrupt)
    assert index(library, model="third").migration.switched
    assert same(vectors_of(library), fresh(tmp_path, album, "third"))
    assert len([*library.glob("*.f16")]) == 2


def test_images_that_cannot_be_read_hold_the_switch_until_they_can(library, album, tmp_path):
    away = tmp_path / "away"
    album.rename(away)
    done = index(library, model="new").migration
    assert not done.switched and len(done.unreadable) == 12
    assert active(library).name == "tiny"
    away.rename(album)
    assert index(library, model="new").migration.switched
    assert same(vectors_of(library), fresh(tmp_path, album, "new")) and problems(library) == []


def test_the_switch_without_unreadable_images_hides_them_until_they_can_be_read(
    library, album, tmp_path
):
    os.rename(album / "3.jpg", tmp_path / "3.jpg")
    done = index(library, model="new", without_unreadable=True).migration
    assert done.switched and len(done.unreadable) == 1
    assert len(vectors_of(library)) == 11
    os.rename(tmp_path / "3.jpg", album / "3.jpg")
    assert index(library, model="new").progress.embedded == 1
    assert same(vectors_of(library), fresh(tmp_path, album, "new")) and problems(library) == []


def test_a_kept_model_that_lacks_new_images_is_completed_first(library, album, tmp_path):
    index(library, model="new")
    photos(album, [30])
    index(library, model="new")
    with pytest.raises(UsageError, match="no vectors of 1 images"):
        switched(library, "tiny")
    states = []
    index(library, model="tiny", on_migration=lambda state: states.append(state.seconds))
    assert active(library).name == "tiny" and len(vectors_of(library)) == 13
    assert same(vectors_of(library), fresh(tmp_path, album, "tiny"))


def test_deleted_images_have_no_vector_in_the_new_model_and_get_one_when_they_return(
    library, album, tmp_path
):
    os.rename(album / "5.jpg", tmp_path / "5.jpg")
    index(library)
    assert index(library, model="new").migration.switched
    os.rename(tmp_path / "5.jpg", album / "5.jpg")
    index(library, model="new")
    assert digest_of(jpeg(5)) in vectors_of(library)
    assert same(vectors_of(library), fresh(tmp_path, album, "new"))


def test_a_source_is_opened_once(tmp_path, monkeypatch):
    photos(tmp_path / "album", range(5))
    table = tmp_path / "pairs.csv"
    rows = ["image,text", *(f"album/{n}.jpg,猫" for n in range(5))]
    table.write_text("\n".join(rows), encoding="utf-8")
    index(tmp_path / "library", f"csv:{table}")
    from cn_clip.search import roots

    calls, original = [], roots.open_source
    monkeypatch.setattr(
        roots, "open_source", lambda uri, **given: calls.append(uri) or original(uri, **given)
    )
    with opened(tmp_path / "library", writable=True) as folder, folder.writing("index"):
        from cn_clip.search.migration import migrate

        assert migrate(folder, embedder("new"), "new").switched
    assert len(calls) <= 2  # two threads may open it at the same moment


def test_compaction_drops_kept_models_and_goes_on_after_a_kill(library):
    index(library, model="new")
    before = vectors_of(library)
    with opened(library, writable=True) as folder, folder.writing("library compact"):
        compact(folder)
    assert len([*library.glob("*.f16")]) == 1 and same(vectors_of(library), before)
    np.testing.assert_equal(problems(library), [])
