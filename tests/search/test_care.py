"""``cn-clip library``: checks, repairs, copies, and removal for good."""

import os
import shutil
import sqlite3
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import encoded, make_image
from search.libraries import (
    embedder,
    found_files,
    index,
    jpeg,
    opened,
    photos,
    problems,
    same,
    vectors_of,
)

from cn_clip.cli import run
from cn_clip.errors import LibraryError, UsageError
from cn_clip.search import purge
from cn_clip.search.backup import back_up, claim_backup
from cn_clip.search.fulltext import tokens
from cn_clip.search.images import thumbnail_of
from cn_clip.search.info import library_facts
from cn_clip.search.merge import merge
from cn_clip.search.moving import move_root
from cn_clip.search.purge import finish_erasures, remove_images, remove_paths
from cn_clip.search.reading import digest_of
from cn_clip.search.repair import repair
from cn_clip.search.switching import compact
from cn_clip.search.vector_file import DTYPE, VectorFile


@pytest.fixture
def album(tmp_path):
    return photos(tmp_path / "album", range(6))


@pytest.fixture
def library(tmp_path, album):
    index(tmp_path / "library", album)
    return tmp_path / "library"


def write(library, function, *arguments):
    """Call a function with the library opened for writing."""
    with opened(library, writable=True) as folder, folder.writing("library test"):
        return function(folder, *arguments)


def sql(library, statement, *values):
    connection = sqlite3.connect(library / "library.db")
    with connection:
        connection.execute(statement, values)
    connection.close()


def damage(library, row, values):
    with (library / "vectors-1.f16").open("r+b") as stream:
        stream.seek(row * 64)
        stream.write(np.full(32, values, np.float16).tobytes())


# Verify and repair.


def test_verify_changes_nothing_and_an_intact_library_has_no_problems(library):
    before = {path: path.read_bytes() for path in library.rglob("*") if path.is_file()}
    assert problems(library, all_files=True) == []
    assert {path: path.read_bytes() for path in library.rglob("*") if path.is_file()} == before
    assert vars_of(write(library, repair)) == (0, 0, 0, False)
    assert problems(library) == []


def vars_of(done):
    return done.lost_vectors, done.recounted, done.thumbnails, done.indexes


@pytest.mark.parametrize("fault", ["cut", "deleted", "zero", "nan", "long", "infinite"])
def test_lost_vectors_are_found_and_embedded_again(library, fault):
    before = vectors_of(library)
    file = library / "vectors-1.f16"
    if fault == "cut":
        os.truncate(file, 3 * 64 + 10)
    elif fault == "deleted":
        file.unlink()
    else:
        damage(library, 2, {"zero": 0, "nan": np.nan, "long": 1.5, "infinite": np.inf}[fault])
    lost = {"cut": 3, "deleted": 6}.get(fault, 1)
    assert len(problems(library)) == 1
    assert vars_of(write(library, repair)) == (lost, 0, 0, False)
    assert len(vectors_of(library)) == 6 - lost
    assert problems(library) == [f"{lost} images have no vector and are not found"]
    assert index(library).progress.embedded == lost
    assert same(vectors_of(library), before) and problems(library) == []


def test_wrong_counts_words_and_orphans_are_put_right(library):
    sql(library, "UPDATE images SET files = 7 WHERE id = 2")
    sql(library, "UPDATE files SET caption = '一只猫' WHERE id = 1")
    orphan = library / "thumbnails" / "ab" / f"ab{'0' * 30}.webp"
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"RIFF")
    orphan.with_suffix(".txt").write_bytes(b"RI")
    (library / "thumbnails" / "77-1.tmp").write_bytes(b"RI")
    (library / "vectors-9.f16").write_bytes(b"left")
    assert len(problems(library)) == 4
    assert vars_of(write(library, repair)) == (0, 1, 2, False)
    assert problems(library) == [] and not (library / "vectors-9.f16").exists()
    assert not (library / "thumbnails" / "77-1.tmp").exists()
    with opened(library) as folder:
        assert folder.query("SELECT rowid, words FROM caption_words") == [(1, tokens("一只猫"))]


def test_facts_beyond_the_vectors_are_embedded_again(library):
    sql(library, "UPDATE models SET rows = 4")
    assert any("beyond the 4 rows" in text for text in problems(library))
    write(library, repair)
    index(library)
    assert problems(library) == [] and len(vectors_of(library)) == 6


@pytest.mark.parametrize("what", ["header", "pages", "empty", "text"])
def test_a_damaged_database_is_beyond_repair_and_the_way_out_is_named(library, what, capsys):
    file = library / "library.db"
    content = bytearray(file.read_bytes())
    if what == "header":
        content[:16] = b"x" * 16
    elif what == "pages":
        for start in range(4096, len(content), 8192):
            content[start : start + 600] = os.urandom(600)
    file.write_bytes({"empty": b"", "text": b"mine " * 2000}.get(what, bytes(content)))
    for command in ("verify", "repair", "info"):
        code = run(["library", command, "--library", str(library)])
        shown = "".join(capsys.readouterr())
        assert code == 1 and "Traceback" not in shown, shown
        if command != "info":
            assert "restore a backup" in shown or "library verify" in shown, shown


def test_an_index_of_the_database_is_rebuilt(library):
    connection = sqlite3.connect(library / "library.db")
    (root,) = connection.execute(
        "SELECT rootpage FROM sqlite_schema WHERE name = 'files_of_image'"
    ).fetchone()
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute("CREATE INDEX other ON files (name)")
    connection.execute(
        "UPDATE sqlite_schema SET rootpage = (SELECT rootpage FROM sqlite_schema "
        "WHERE name = 'other') WHERE name = 'files_of_image'"
    )
    connection.execute("DELETE FROM sqlite_schema WHERE name = 'other'")
    connection.commit()
    connection.close()
    assert root and problems(library)
    assert write(library, repair).indexes
    assert problems(library) == []


def test_content_that_changed_unseen_is_found(library, album):
    status = (album / "0.jpg").stat()
    content = bytearray(jpeg(0))
    content[-5] ^= 1
    (album / "0.jpg").write_bytes(content)
    os.utime(album / "0.jpg", ns=(status.st_atime_ns, status.st_mtime_ns))
    (album / "1.jpg").write_bytes(jpeg(9))  # will be indexed
    (album / "2.jpg").unlink()
    (text,) = problems(library, all_files=True)
    assert "0.jpg has other content" in text


# Removal.


def traces(library, *needles):
    """The files of a library whose name or bytes hold one of the needles."""
    return [
        path.name
        for path in library.rglob("*")
        for needle in needles
        if path.is_file() and (needle in path.read_bytes() or needle.hex() in path.name)
    ]


@pytest.fixture
def secret(library, album):
    """What is to be removed: an image with every kind of fact; returns its traces."""
    (album / "geheim").mkdir()
    (album / "geheim" / "privates-foto.jpg").write_bytes(jpeg(77))
    index(library, album)
    with opened(library, writable=True) as folder:
        image = found_files(library)["geheim/privates-foto.jpg"]
        with folder.database.transaction() as connection:
            connection.execute("UPDATE files SET caption = 'zzcaption' WHERE image = ?", (image,))
            connection.execute("UPDATE images SET text = 'zztext' WHERE id = ?", (image,))
            for table, key in (("caption_words", "files.id"), ("image_words", "images.id")):
                connection.execute(
                    f"INSERT INTO {table} (rowid, words) SELECT {key}, ? FROM files "
                    "JOIN images ON images.id = files.image WHERE images.id = ?",
                    (f"zzword{table}", image),
                )
        thumbnail = thumbnail_of(folder, image)
        vector = np.array(folder.snapshot().vectors[image - 1])
        (folder.path / "cache").mkdir(exist_ok=True)
        (folder.path / "cache" / "codes").write_bytes(b"derived" + vector.tobytes())
    digest = digest_of(jpeg(77))
    needles = (
        b"privates-foto", b"zzcaption", b"zztext", b"zzword", digest, vector.tobytes(), thumbnail,
    )  # fmt: skip
    assert all(traces(library, needle) for needle in needles)
    return image, needles


@pytest.mark.parametrize("by", ["id", "file", "folder", "root"])
def test_nothing_of_a_removed_image_is_left_in_any_file(library, album, secret, by):
    image, needles = secret
    if by == "id":
        done = write(library, remove_images, [image])
    else:
        path = {"file": "geheim/privates-foto.jpg", "folder": "geheim", "root": ""}[by]
        done = write(library, remove_paths, [str(album / path)])
    assert done.is_erased and done.images == (7 if by == "root" else 1)
    assert traces(library, *needles) == []
    assert problems(library) == []
    if by != "root":
        assert [os.path.basename(path) for path in done.on_disk] == ["privates-foto.jpg"]
        assert len(vectors_of(library)) == 6
        (album / "geheim" / "privates-foto.jpg").unlink()
        index(library)
        photos(album, [50])
        index(library)
        assert found_files(library)["50.jpg"] == image + 1  # its id is not used again


def test_a_removed_image_is_not_in_the_vectors_of_any_model(library, album, tmp_path):
    index(library, model="new")
    stored = [np.fromfile(path, DTYPE).reshape(-1, 32)[2] for path in library.glob("*.f16")]
    write(library, remove_images, [3])
    assert traces(library, *(row.tobytes() for row in stored)) == []
    assert index(library, model="third").migration.switched and problems(library) == []


def test_an_image_with_a_file_elsewhere_stays(library, album, tmp_path):
    other = photos(tmp_path / "other", [0, 20])
    index(library, other)
    done = write(library, remove_paths, [str(other)])
    assert (done.files, done.images) == (2, 1)
    assert len(vectors_of(library)) == 6
    with pytest.raises(UsageError, match=r"nothing was indexed from .*other; what was: .*album"):
        write(library, remove_paths, [str(other)])
    with pytest.raises(UsageError, match="no image 99"):
        write(library, remove_images, [1, 99])
    assert len(vectors_of(library)) == 6


STEPS = ["erase", "remove_thumbnail", "rmtree", "rewrite", "VACUUM", "done"]


@pytest.mark.parametrize("step", STEPS)
def test_a_removal_survives_a_kill_at_any_step(library, album, secret, step, monkeypatch):
    image, needles = secret

    class Killed(BaseException):
        pass

    def kill(*_unused, **__):
        raise Killed

    if step == "erase":
        monkeypatch.setattr(VectorFile, "erase", kill)
    elif step == "rmtree":
        monkeypatch.setattr(purge, "shutil", SimpleNamespace(rmtree=kill))
    elif step in ("remove_thumbnail", "rewrite"):
        monkeypatch.setattr(purge, step, kill)
    elif step == "VACUUM":
        original = purge.rewrite
        monkeypatch.setattr(purge, "rewrite", lambda library: original(library) and kill())
    with opened(library, writable=True) as folder, folder.writing("library remove"):
        try:
            remove_images(folder, [image])
        except Killed:
            pass
        else:
            assert step == "done"
    monkeypatch.undo()
    assert len(vectors_of(library)) == 6  # hidden from the first moment on
    if step != "done":
        assert "1 removed images are not erased yet" in problems(library)
    (album / "geheim" / "privates-foto.jpg").unlink()
    index(library)
    assert traces(library, *needles) == [] and problems(library) == []


def test_a_reader_of_an_old_state_delays_the_end_of_a_removal(library, secret, monkeypatch):
    image, needles = secret
    monkeypatch.setattr("cn_clip.search.database._BUSY_SECONDS", 0.1)
    with opened(library) as reader, reader.reading() as connection:
        connection.execute("SELECT COUNT(*) FROM images").fetchone()
        done = write(library, remove_images, [image])
        assert not done.is_erased
    with opened(library, writable=True) as folder:
        assert finish_erasures(folder)
    assert traces(library, *needles) == []


# Compaction.


def test_compaction_removes_absent_images_and_keeps_ids(library, album):
    before = found_files(library)
    for number in (0, 1):
        (album / f"{number}.jpg").unlink()
    index(library)
    done = write(library, compact)
    assert (done.files, done.images) == (2, 2)
    assert found_files(library) == {k: v for k, v in before.items() if k not in ("0.jpg", "1.jpg")}
    assert problems(library) == []
    assert traces(library, digest_of(jpeg(0))) == []


def test_compaction_frees_the_space_of_removed_vectors(tmp_path, album, library):
    with opened(library, writable=True) as folder:
        rng = np.random.default_rng(0)
        vectors = rng.normal(size=(8192, 32)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        file = folder.vector_file(folder.active_model())
        file.write(6, vectors)
        with folder.database.transaction() as connection:
            connection.execute("UPDATE models SET rows = ?", (6 + 8192,))
            connection.executemany(
                "INSERT INTO erasures (image, pending) VALUES (?, 2)",
                [(image,) for image in range(7, 8000)],
            )
            connection.execute("UPDATE erasures SET digest = x'00'")
            connection.executemany(
                "INSERT INTO missing VALUES (1, ?)", [(image,) for image in range(8000, 8199)]
            )
    before = vectors_of(library)
    size = os.stat(library / "vectors-1.f16").st_blocks
    with opened(library) as reader:
        old = reader.snapshot()
        write(library, compact)
        assert old.count == reader.snapshot().count == 6  # the old file is still mapped
    (file,) = library.glob("*.f16")
    assert file.name == "vectors-2.f16" and file.stat().st_size == (6 + 8192) * 64
    assert file.stat().st_blocks < size / 4
    assert same(vectors_of(library), before) and problems(library) == []
    write(library, compact)
    assert [*library.glob("*.f16")] == [file]  # nothing more to gain


def test_rows_are_copied_without_pages_of_zeros(tmp_path):
    rng = np.random.default_rng(0)
    for rows, dim in ((0, 8), (1, 8), (257, 8), (1000, 512), (5000, 3)):
        vectors = rng.normal(size=(rows, dim)).astype(DTYPE)
        vectors[rng.random(rows) < 0.7] = 0
        vectors[rows // 3 : rows // 2] = 0
        one, two = (VectorFile(tmp_path / f"{name}-{rows}", dim) for name in "ab")
        one.write(0, vectors)
        one.copy_to(two, rows)
        assert (np.asarray(two.open(rows)) == vectors).all() and two.rows_stored() == rows
        chosen = np.flatnonzero(rng.random(rows) < 0.4)
        two.overwrite(chosen, vectors[chosen] + 1)
        vectors[chosen] += 1
        assert (np.asarray(two.open(rows)) == vectors).all()


# Backup.


def test_a_backup_is_a_library(library, album, tmp_path):
    out = tmp_path / "backup"
    with opened(library) as folder:
        assert back_up(folder, claim_backup(library, str(out))) == 6
    assert same(vectors_of(out), vectors_of(library)) and problems(out, all_files=True) == []
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {"library.db", "library.json", "vectors-1.f16"} < names
    assert sum(name.endswith(".webp") for name in names) == 6
    assert not any("-wal" in name for name in names)
    shutil.rmtree(library)
    photos(album, [40])
    assert index(out).progress.embedded == 1  # it goes on where the library was


def test_a_backup_replaces_only_an_unchanged_backup(library, tmp_path, capsys):
    out = tmp_path / "backup"
    words = ["library", "backup", "--library", str(library), "--out", str(out)]
    assert run(words) == 0 and run(words) == 2
    assert run([*words, "--overwrite", "--no-thumbnails"]) == 0 and problems(out) == []
    assert not (out / "thumbnails").exists()
    vectors_of(out)
    (out / "cache").mkdir()
    (out / "cache" / "index").write_text("of a search")
    assert run([*words, "--overwrite"]) == 0
    (out / "diary").write_text("mine")
    capsys.readouterr()
    assert run([*words, "--overwrite"]) == 2 and "diary" in capsys.readouterr().err
    inside = [*words[:-1], str(library / "backup")]
    assert run(inside) == 2 and not (library / "backup").exists()


def test_a_backup_beside_a_writer_is_one_state(library, album, tmp_path, monkeypatch):
    """What a writer adds and removes while the vectors are copied is not in the backup."""
    original, out = VectorFile.copy_to, tmp_path / "backup"

    def copy_later(self, other, rows):
        monkeypatch.setattr(VectorFile, "copy_to", original)
        photos(album, range(30, 33))
        index(library)
        write(library, remove_images, [2])
        original(self, other, rows)

    monkeypatch.setattr(VectorFile, "copy_to", copy_later)
    with opened(library) as folder:
        back_up(folder, out)
    expected = {digest_of(jpeg(number)) for number in range(6)} - {digest_of(jpeg(1))}
    assert vectors_of(out).keys() == expected
    assert problems(out) == ["1 images have no vector and are not found"]


def test_a_backup_survives_the_change_of_the_model(library, album, tmp_path, monkeypatch):
    original, out = VectorFile.copy_to, tmp_path / "backup"

    def copy_later(self, other, rows):
        monkeypatch.setattr(VectorFile, "copy_to", original)
        index(library, model="new", keep_old=False)
        original(self, other, rows)

    monkeypatch.setattr(VectorFile, "copy_to", copy_later)
    with opened(library) as folder:
        back_up(folder, out)
    assert same(vectors_of(out), vectors_of(library)) and problems(out) == []


# Merge.


def test_a_merge_takes_images_files_and_texts_without_embedding(library, album, tmp_path):
    other = tmp_path / "other-library"
    table = tmp_path / "pairs.csv"
    photos(tmp_path / "more", [0, 10, 11])
    (tmp_path / "more" / "bad.jpg").write_bytes(b"bad")
    table.write_text("image,text\nmore/11.jpg,一只猫", encoding="utf-8")
    index(other, tmp_path / "more", f"csv:{table}")
    sql(other, "UPDATE images SET text = '海' WHERE digest = ?", digest_of(jpeg(10)))
    with opened(other) as source:
        done = write(library, merge, source)
        again = write(library, merge, source)
    assert (done.images, done.files) == (2, 5) and (again.images, again.files) == (0, 0)
    expected = {digest_of(jpeg(number)) for number in (*range(6), 10, 11)}
    assert vectors_of(library).keys() == expected and problems(library, all_files=True) == []
    vectors = vectors_of(library) | vectors_of(other)
    assert same(vectors_of(library), {key: vectors[key] for key in expected})
    assert index(library).progress.embedded == 0
    with opened(library) as folder:
        facts = library_facts(folder)
    assert [root.files for root in facts.roots] == [6, 4, 1] and facts.with_text == 1


def test_a_merge_into_a_new_library_makes_it_dense(library, album, tmp_path):
    write(library, remove_images, [1, 2, 3])
    from cn_clip.search.folder import create

    create(tmp_path / "dense")
    with opened(library) as source:
        assert write(tmp_path / "dense", merge, source).images == 3
    assert same(vectors_of(tmp_path / "dense"), vectors_of(library))
    with opened(tmp_path / "dense") as folder:
        assert folder.active_model().rows == 3 and problems(folder.path) == []


def test_a_merge_fits_folders_into_each_other(library, album, tmp_path):
    inner = photos(album / "2024", [20, 21])
    index(tmp_path / "inner", inner)
    with opened(tmp_path / "inner") as source:
        write(library, merge, source)
    assert found_files(library).keys() >= {"2024/20.jpg", "2024/21.jpg"}
    done = index(library).progress
    assert (done.embedded, done.unchanged) == (0, 8)
    with opened(library) as source, pytest.raises(UsageError, match="merge the other way round"):
        write(tmp_path / "inner", merge, source)


def test_libraries_of_different_models_do_not_merge(library, album, tmp_path):
    index(tmp_path / "other", album, model="other")
    with (
        opened(tmp_path / "other") as source,
        pytest.raises(LibraryError, match="made with the model other"),
    ):
        write(library, merge, source)
    with opened(library) as source, pytest.raises(UsageError, match="itself"):
        write(library, merge, source)
    with opened(tmp_path / "other", writable=True) as source:
        fingerprint = sql_value(library, "SELECT fingerprint FROM models")
        with source.database.transaction() as connection:
            connection.execute("UPDATE models SET derived_from = ?", (fingerprint,))
        with pytest.raises(LibraryError, match="made with"):  # its vectors tell that it lies
            write(library, merge, source)


def sql_value(library, statement):
    with opened(library) as folder:
        return folder.query(statement)[0][0]


def test_an_interrupted_merge_goes_on(library, tmp_path, monkeypatch):
    monkeypatch.setattr("cn_clip.search.merge._TOGETHER", 4)
    index(tmp_path / "other", photos(tmp_path / "more", range(20, 40)))

    def interrupt(done, total):
        if done >= 8:
            raise KeyboardInterrupt

    with opened(tmp_path / "other") as source:
        with pytest.raises(KeyboardInterrupt):
            write(library, lambda folder: merge(folder, source, on_progress=interrupt))
        assert problems(library) == [] and len(vectors_of(library)) == 14
        assert write(library, merge, source).images == 12
    assert len(vectors_of(library)) == 26 and problems(library) == []


# Moves.


def test_a_moved_folder_is_not_read_again(library, album, tmp_path):
    new = tmp_path / "disk" / "album"
    new.parent.mkdir()
    album.rename(new)
    (move,) = write(library, move_root, str(album), str(new))
    assert (move.checked, move.found) == (6, 6)
    done = index(library).progress
    assert (done.unchanged, done.deleted, done.unreadable) == (6, 0, [])


def test_a_disk_with_several_roots_moves_as_a_whole(tmp_path):
    library, old, new = tmp_path / "library", tmp_path / "old", tmp_path / "new"
    photos(old / "a", [1]), photos(old / "b", [2, 3])
    (old / "t.csv").write_text("image,text\na/1.jpg,猫")
    index(library, old / "a", old / "b", f"csv:{old}/t.csv")
    old.rename(new)
    moves = write(library, move_root, str(old), str(new))
    assert [os.path.relpath(move.new.removeprefix("csv:"), new) for move in moves] == [
        "a", "b", "t.csv"
    ]  # fmt: skip
    assert index(library).progress.unreadable == []


def test_two_disks_may_swap_places(tmp_path):
    library, a, b = tmp_path / "library", tmp_path / "a", tmp_path / "b"
    index(library, photos(a, [1]), photos(b, [2]))
    a.rename(tmp_path / "c")
    with pytest.raises(UsageError, match="was indexed too"):
        photos(b, [1])
        write(library, move_root, str(a), str(b))


def test_a_move_to_a_place_without_the_files_is_refused(library, album, tmp_path):
    other = photos(tmp_path / "other", range(50, 52))
    for old, new, message in (
        (album, other, "none of 6 files"),
        (album, tmp_path / "nowhere", "no such folder"),
        (tmp_path / "never", other, r"nothing was indexed from .*; what was: .*album"),
    ):
        with pytest.raises(UsageError, match=message):
            write(library, move_root, str(old), str(new))
    index(library, other)
    inside = shutil.copytree(album, other / "album")
    with pytest.raises(UsageError, match="is inside"):
        write(library, move_root, str(album), str(inside))
    assert index(library).progress.unchanged == 8 or sys.platform == "win32"


# The command line.


def test_the_commands_of_a_named_library(album, tmp_path, tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.setenv("CN_CLIP_LIBRARIES", str(tmp_path / "libraries"))
    (tmp_path / "libraries").mkdir()
    model = ["--model", str(tiny_checkpoint), "--device", "cpu"]
    (album / "x.png").write_bytes(encoded(make_image(8), "PNG"))
    assert run(["library", "list"]) == 0
    assert "no libraries in" in capsys.readouterr().out
    assert run(["index", str(album), "--library", "photos", *model]) == 0
    other = photos(tmp_path / "other", [20])
    assert run(["index", str(other), "--library", "b", *model]) == 0
    (tmp_path / "libraries" / "b" / "library.db").write_bytes(b"damaged" * 999)
    capsys.readouterr()
    at = ["--library", "photos"]
    for words, code, shown in (
        (["list"], 0, "photos"),
        (["info", *at], 0, "7, 0 more"),
        (["verify", *at, "--all"], 0, "0 problems; 7 images, 7 vectors and 7 files"),
        (["repair", *at], 0, "0 lost vectors"),
        (["compact", *at], 0, "0 images removed"),
        (["backup", *at, "--out", str(tmp_path / "backup")], 0, "7 images in"),
        (["merge", str(tmp_path / "backup"), *at], 0, "0 new images and 0 files"),
        (["remove", str(album / "x.png"), *at], 0, "1 images and 1 files removed"),
        (["remove", "--images", "1", "2", *at], 0, "2 images and 2 files removed"),
        (["remove", *at], 2, "give what to remove"),
        (["switch", "1", *at], 0, "searches use"),
        (["switch", "nothing", *at], 2, "is no model of this library"),
        (["move-root", str(album), str(other), *at], 2, "none of 4 files"),
        (["info", "--library", "nothing"], 1, "there is no library"),
        (["verify", "--library", "b"], 1, "damaged"),
    ):
        assert run(["library", *words]) == code, words
        assert shown in "".join(capsys.readouterr()), words
        if code == 0:
            if words[0] == "backup":
                words.append("--overwrite")
            if words[0] == "remove":
                continue
            assert run(["library", *words, "--json"]) == 0
            assert '"format": "cn-clip json 1"' in capsys.readouterr().out
    assert embedder().dim == 32
