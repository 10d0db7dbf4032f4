"""``cn-clip index``: what is added, changed, gone and back, and what cannot be read."""

import io
import json
import os
import shutil
import sqlite3
import sys
import tarfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from urllib.parse import unquote_to_bytes

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
    vectors_of,
)

from cn_clip.cli import run
from cn_clip.errors import CNClipError, DataError, LibraryError, UsageError
from cn_clip.search import database, indexing, roots, updating, watching
from cn_clip.search.folder import create
from cn_clip.search.images import image_bytes
from cn_clip.search.purge import remove_images
from cn_clip.search.reading import digest_of
from cn_clip.search.roots import display_path


@pytest.fixture
def library(tmp_path) -> Path:
    return tmp_path / "library"


@pytest.fixture
def album(tmp_path) -> Path:
    return photos(tmp_path / "album", range(4))


def counts(done):
    state = done.progress
    return {
        name: getattr(state, name)
        for name in ("new", "changed", "unchanged", "deleted", "returned", "embedded")
        if getattr(state, name)
    }


def later(path: Path) -> None:
    """Give a file another time of change."""
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))


def test_every_image_is_stored_with_its_own_vector(library, album):
    assert counts(index(library, album)) == {"new": 4, "embedded": 4}
    expected = embedder().embed_images([jpeg(number) for number in range(4)])
    stored = vectors_of(library)
    for number in range(4):
        vector = np.float32(stored[digest_of(jpeg(number))])
        assert vector @ expected[number] > 0.999
    assert problems(library) == []


def test_unchanged_files_are_neither_read_nor_embedded(library, album, monkeypatch):
    index(library, album)
    monkeypatch.setattr("cn_clip.search.roots.read_file", lambda path: pytest.fail("read"))
    assert counts(index(library, album)) == {"unchanged": 4}
    assert counts(index(library)) == {"unchanged": 4}


def test_a_touched_file_is_read_and_a_changed_one_embedded(library, album):
    index(library, album)
    later(album / "0.jpg")
    (album / "1.jpg").write_bytes(jpeg(9))
    later(album / "1.jpg")
    assert counts(index(library)) == {"changed": 1, "unchanged": 3, "embedded": 1}
    assert vectors_of(library).keys() == {digest_of(jpeg(n)) for n in (0, 9, 2, 3)}
    (album / "1.jpg").write_bytes(jpeg(1))
    assert index(library).progress.embedded == 0  # its vector was kept


def test_moved_files_and_copies_share_the_vector(library, album):
    index(library, album)
    before = found_files(library)
    (album / "0.jpg").rename(album / "moved.jpg")
    (album / "copies").mkdir()
    shutil.copy(album / "1.jpg", album / "copies" / "1.jpg")
    done = index(library).progress
    assert (done.embedded, done.moved_or_copied, done.deleted) == (0, 2, 1)
    after = found_files(library)
    assert after["moved.jpg"] == before["0.jpg"] and after["copies/1.jpg"] == before["1.jpg"]


def test_copies_among_new_files_are_embedded_once(library, tmp_path):
    folder = tmp_path / "album"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.jpg").write_bytes(jpeg(number % 2))
    assert counts(index(library, folder)) == {"new": 20, "embedded": 2}
    assert len(vectors_of(library)) == 2 and problems(library) == []


def test_deleted_files_are_hidden_and_shown_when_they_return(library, album, tmp_path):
    index(library, album)
    (album / "2.jpg").rename(tmp_path / "2.jpg")
    assert counts(index(library)) == {"deleted": 1, "unchanged": 3}
    assert len(vectors_of(library)) == 3
    (tmp_path / "2.jpg").rename(album / "2.jpg")
    assert counts(index(library)) == {"returned": 1, "unchanged": 3}
    assert len(vectors_of(library)) == 4


def test_a_damaged_image_is_listed_once_and_tried_again_when_it_changes(library, album):
    (album / "bad.jpg").write_bytes(jpeg(0)[:200])
    (album / "same.jpg").write_bytes(jpeg(0)[:200])
    failed = index(library, album).progress.failed
    assert sorted(Path(path).name for path, _ in failed) == ["bad.jpg", "same.jpg"]
    again = index(library).progress
    assert (again.failed, again.known_failures) == ([], 2)
    (album / "bad.jpg").write_bytes(jpeg(7))
    assert index(library).progress.embedded == 1
    (album / "same.jpg").rename(album / "bad.gif")
    (album / "bad.gif").rename(album / "same.jpg")
    assert index(library).progress.known_failures == 1


@pytest.mark.skipif(sys.platform == "win32" or os.getuid() == 0, reason="root reads everything")
def test_a_folder_without_permission_keeps_its_images(library, album):
    inner = photos(album / "private", range(10, 12))
    index(library, album)
    inner.chmod(0)
    try:
        done = index(library).progress
    finally:
        inner.chmod(0o755)
    assert done.deleted == 0 and "private cannot be read" in done.unreadable[0]
    assert len(vectors_of(library)) == 6


def test_an_unreadable_folder_keeps_its_images(library, album, monkeypatch):
    inner = photos(album / "private", range(10, 12))
    index(library, album)
    scandir = os.scandir

    def refuse(path="."):
        if path == os.fspath(inner):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    (album / "0.jpg").unlink()
    done = index(library).progress
    assert done.deleted == 1 and "private cannot be read" in done.unreadable[0]
    assert len(vectors_of(library)) == 5


@pytest.mark.parametrize("state", ["gone", "empty"])
def test_an_unmounted_disk_keeps_its_images(library, album, state):
    index(library, album)
    shutil.rmtree(album)
    if state == "empty":
        album.mkdir()
    done = index(library).progress
    assert done.deleted == 0 and len(done.unreadable) == 1
    assert len(vectors_of(library)) == 4


def test_links_that_loop_end(library, album):
    (album / "loop").symlink_to(album)
    (album / "inner").mkdir()
    (album / "inner" / "up").symlink_to("..")
    (album / "self.jpg").symlink_to("self.jpg")
    (album / "gone.jpg").symlink_to("nowhere.jpg")
    assert counts(index(library, album)) == {"new": 4, "embedded": 4}


@pytest.mark.skipif(sys.platform != "linux", reason="names are UTF-8 there")
def test_names_that_are_not_utf_8(library, album):
    name = "照片".encode("gbk") + b".jpg"
    Path(os.fsdecode(os.fsencode(album) + b"/" + name)).write_bytes(jpeg(8))
    assert index(library, album).progress.new == 5
    assert os.fsdecode(name) in found_files(library)
    assert counts(index(library)) == {"unchanged": 5}
    path = display_path("folder", os.fsencode(album), name)
    path.encode()  # it can be printed
    assert unquote_to_bytes(path) == os.fsencode(album) + b"/" + name


def test_hidden_files_system_folders_and_libraries_are_skipped(library, album):
    for name in (".hidden", "@eaDir", "node_modules", "deep/.cache"):
        photos(album / name, [5])
    (album / "._0.jpg").write_bytes(jpeg(6))
    (album / "notes.txt").write_text("mine")
    inside = album / "library"
    index(inside, photos(album.parent / "else", [1]))
    assert index(library, album).progress.new == 4
    hidden = index(library, album, globs={"hidden": True}).progress
    assert hidden.new == 2  # .hidden and deep/.cache, never ._0.jpg


def test_globs_choose_files(library, album):
    photos(album / "2024", [5, 6])
    (album / "2024" / "5.PNG").write_bytes(encoded(make_image(7), "PNG"))
    index(library, album, globs={"include": ["*.png", "2024/*"], "exclude": ["6.*"]})
    assert sorted(found_files(library)) == ["2024/5.PNG", "2024/5.jpg"]
    assert counts(index(library, album)) == {"unchanged": 2}  # the globs are kept
    index(library, album, globs={"exclude": ["2024"]})
    assert sorted(found_files(library)) == [f"{n}.jpg" for n in range(4)]
    with pytest.raises(UsageError, match="absolute path"):
        index(library, album, globs={"include": ["/etc/*"]})


def test_sources_of_pairs(library, tmp_path, album):
    table = tmp_path / "pairs.csv"
    rows = ["image,text", "album/0.jpg,一只猫", "album/0.jpg,睡着的猫", "album/1.jpg,海边"]
    table.write_text("\n".join(rows), encoding="utf-8")
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as archive:
        for name, content in (("a.jpg", jpeg(5)), ("a.txt", "日落".encode())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    os.utime(shard, (1, 1))
    done = index(library, f"csv:{table}", f"tar:{shard}").progress
    assert (done.new, done.embedded) == (3, 3)
    with opened(library) as folder:
        captions = folder.query("SELECT caption FROM files ORDER BY id")
    assert captions == [("一只猫\n睡着的猫",), ("海边",), ("日落",)]
    assert index(library).progress.embedded == 0
    with opened(library) as folder:  # an unchanged shard is not read again
        assert folder.query("SELECT COUNT(stamp) FROM roots")[0][0] == 1
    table.write_text("\n".join([*rows[:2], "album/2.jpg,新"]), encoding="utf-8")
    done = index(library).progress  # 2.jpg has the content of no image so far
    assert (done.new, done.deleted, done.embedded) == (1, 1, 1)
    shard.unlink()
    done = index(library).progress
    assert done.deleted == 0 and "kept" in done.unreadable[0]


def test_images_without_texts_of_a_tar_and_a_table_are_indexed(library, tmp_path, album):
    table, shard = tmp_path / "images.csv", tmp_path / "shard.tar"
    table.write_text("image\nalbum/0.jpg\nalbum/1.jpg\n", encoding="utf-8")
    with tarfile.open(shard, "w") as archive:
        for name, content in (("a.jpg", jpeg(5)), ("b.jpg", jpeg(6)), ("b.txt", "日落".encode())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    done = index(library, f"csv:{table}", f"tar:{shard}").progress
    assert (done.new, done.embedded, done.unreadable) == (4, 4, [])
    with opened(library) as folder:
        captions = folder.query("SELECT name, caption FROM files WHERE root = 2 ORDER BY name")
        assert captions == [(b"a", None), (b"b", "日落")]
        assert [image_bytes(folder, image) for image in (3, 4)] == [jpeg(5), jpeg(6)]


def test_folders_inside_each_other_are_refused(library, album):
    inner = photos(album / "inner", [5])
    index(library, album)
    with pytest.raises(UsageError, match="is inside"):
        index(library, inner)
    with pytest.raises(UsageError, match="is inside"):
        index(library.with_name("other"), inner, album)
    with pytest.raises(UsageError, match="whole file system"):
        index(library, "/")


def test_a_second_indexer_is_told_who_holds_the_library(library, album):
    index(library, album)
    with opened(library, writable=True) as folder, folder.writing("index"):
        with pytest.raises(LibraryError, match=f"cn-clip index.*process {os.getpid()} on"):
            index(library)
        assert len(vectors_of(library)) == 4  # readers go on
    index(library)


def test_readers_see_a_writers_commits_and_nothing_else(library, album):
    index(library, album)
    with opened(library) as reader, opened(library, writable=True) as writer:
        assert reader.snapshot().count == 4
        with writer.database.transaction() as connection:
            connection.execute("UPDATE files SET present = 0 WHERE id = 1")
            assert reader.snapshot().count == 4
        assert reader.snapshot().count == 3
    photos(album, [7])
    with opened(library) as reader:
        before = reader.snapshot()
        index(library)
        assert (before.count, reader.snapshot().count) == (3, 5)


def test_a_read_only_library_can_be_searched_but_not_written(library, album, monkeypatch):
    index(library, album)
    library.chmod(0o555)
    (library / "library.db").chmod(0o444)
    try:
        monkeypatch.setattr(os, "access", lambda path, mode, **_: mode != os.W_OK)  # for root too
        assert len(vectors_of(library)) == 4
        if os.getuid():
            with pytest.raises(CNClipError, match=r"permission|could not write|readonly"):
                index(library)
    finally:
        library.chmod(0o755)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_one_sentence(library, tmp_path):
    with pytest.raises(CNClipError, match="Free some space"):
        index(library, photos(tmp_path / "many", range(300)))


def test_after_a_full_disk_indexing_goes_on(library, album):
    resource = pytest.importorskip("resource")
    index(library, album)
    photos(album, range(300))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # of the database or its log
    try:
        with pytest.raises(CNClipError, match="Free some space"):
            index(library)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert problems(library) == [] and len(vectors_of(library)) < 300
    index(library)
    assert len(vectors_of(library)) == 300 and problems(library) == []


def test_a_library_of_a_newer_version_is_refused(library, album):
    index(library, album)
    about = library / "library.json"
    about.write_text(about.read_text().replace("library 1", "library 2"))
    for call in (lambda: opened(library), lambda: index(library, album)):
        with pytest.raises(LibraryError, match="newer cn_clip; update"):
            call()


def test_a_folder_with_other_files_does_not_become_a_library(tmp_path, album):
    with pytest.raises(UsageError, match=r"holds 0\.jpg"):
        index(album, album)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        create(file)


def test_a_creation_that_was_killed_is_completed(library, album):
    create(library)
    (library / "library.json").unlink()
    (library / ".library.json.abcdefgh.cn-clip-tmp").mkdir()
    assert index(library, album).progress.new == 4


def test_a_vector_file_cut_short_is_refused_until_it_is_repaired(library, album):
    index(library, album)
    file = library / "vectors-1.f16"
    os.truncate(file, file.stat().st_size - 70)
    for call in (lambda: vectors_of(library), lambda: index(library)):
        with pytest.raises(LibraryError, match="cn-clip library repair"):
            call()


def test_no_images_at_all(library, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert counts(index(library, empty)) == {}
    with opened(library) as folder:
        assert folder.snapshot().count == 0
    with pytest.raises(UsageError, match="no such folder"):
        index(library, tmp_path / "nowhere")
    with pytest.raises(UsageError, match="give the folders"):
        index(tmp_path / "new")


def test_rows_of_a_killed_writer_are_overwritten(library, album):
    index(library, photos(album, range(4)))
    with (library / "vectors-1.f16").open("ab") as stream:
        stream.write(b"\x11" * 150)  # two rows and a half that were never committed
    index(library, photos(album, [8]))
    assert problems(library) == [] and len(vectors_of(library)) == 5


def test_an_interrupted_run_keeps_what_was_committed_and_resumes(library, album, monkeypatch):
    monkeypatch.setattr("cn_clip.search.indexing.COMMIT_IMAGES", 4)
    photos(album, range(40))

    def interrupt(state):
        if state.embedded >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index(library, album, on_progress=interrupt)
    kept = len(vectors_of(library))
    assert 16 <= kept < 40 and problems(library) == []
    done = index(library).progress
    assert done.embedded == 40 - kept and len(vectors_of(library)) == 40


def test_a_derived_model_is_verified_and_another_refused(library, album, monkeypatch):
    from cn_clip.search import library_model
    from cn_clip.search.library_model import check_same

    index(library, album)
    with opened(library) as folder:
        model = folder.active_model()
        with pytest.raises(LibraryError, match="was made with the model"):
            check_same(folder, model, embedder("other"))
        derived = Derived(embedder(), model.fingerprint, np.eye(32))
        check_same(folder, model, derived)
        assert derived.calls
        derived.calls = 0
        check_same(folder, model, derived)  # the result was kept
        assert not derived.calls
        mixed = np.random.default_rng(0).permutation(np.eye(32))
        with pytest.raises(LibraryError, match="other embeddings"):
            check_same(folder, model, Derived(embedder(), model.fingerprint, mixed, "f"))
    assert library_model.MIN_COSINE >= 0.98


class Derived:
    """A model in another precision: its embeddings are rotated."""

    def __init__(self, original, derived_from, rotation, fingerprint="derived"):
        self.name, self.fingerprint, self.derived_from = "tiny", fingerprint, derived_from
        self.original, self.rotation, self.calls = original, rotation, 0

    def embed_readable(self, contents):
        self.calls += 1
        vectors, errors = self.original.embed_readable(contents)
        return vectors @ self.rotation, errors


def test_exif_dates_places_and_thumbnails(library, tmp_path):
    from PIL import Image

    folder = tmp_path / "album"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    exif.get_ifd(0x8769)[0x9003] = "2024:05:01 12:30:00"
    exif.get_ifd(0x8825).update({1: "S", 2: (30.0, 30.0, 0.0), 3: "E", 4: (104.0, 0.0, 0.0)})
    make_image(0, (80, 60)).save(folder / "0.jpg", exif=exif)
    index(library, folder)
    with opened(library) as opened_library:
        facts = opened_library.query("SELECT width, height, taken, latitude, longitude FROM images")
        from cn_clip.search.images import thumbnail_of

        thumbnail = thumbnail_of(opened_library, 1)
    assert facts == [(60, 80, "2024-05-01T12:30:00", -30.5, 104.0)]
    with Image.open(io.BytesIO(thumbnail)) as small:
        assert (small.format, small.size) == ("WEBP", (60, 80))


def test_the_default_library_of_the_command_line_is_made_in_the_data_folder(
    album, tmp_path, monkeypatch
):
    monkeypatch.setenv("CN_CLIP_LIBRARIES", str(tmp_path / "libraries"))
    from cn_clip.search.places import library_path, named_libraries

    index(library_path("default"), album)
    assert [path.name for path in named_libraries()] == ["default"]
    assert updating.is_library(tmp_path / "libraries" / "default")


def test_images_of_a_source_are_read_by_one_that_stays_open_until_it_changes(library, tmp_path):
    shard, now = tmp_path / "shard.tar", 1

    def write(numbers):
        nonlocal now
        with tarfile.open(shard, "w") as archive:
            for number in numbers:
                for name, content in ((f"{number}.jpg", jpeg(number)), (f"{number}.txt", b"cat")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        now += 1
        os.utime(shard, (now, now))
        return index(library, f"tar:{shard}")

    write([1, 2])
    images, opens = found_files(library), []
    original = roots.open_source
    with opened(library) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            roots, "open_source", lambda uri, **o: opens.append(uri) or original(uri, **o)
        )
        assert image_bytes(folder, images["1"]) == jpeg(1)
        assert image_bytes(folder, images["2"]) == jpeg(2)
        assert len(opens) == 1
    write([5, 6, 2])
    with opened(library) as folder:
        assert image_bytes(folder, images["2"]) == jpeg(2)
        with pytest.raises(LibraryError, match="cannot be read"):
            image_bytes(folder, images["1"])


def test_images_in_other_formats_are_counted_by_suffix(library, album):
    for name in ("a.CR2", "b.cr2", "c.psd", "d.txt", ".hidden.cr2"):
        (album / name).touch()
    (album / "folder.psd").mkdir()
    done = index(library, album).progress
    assert done.skipped == {".cr2": 2, ".psd": 1} and done.new == 4 and not done.failed
    assert asdict(index(library).progress)["skipped"] == done.skipped
    assert index(library, album, globs={"exclude": ["*.CR2"]}).progress.skipped == {".psd": 1}


def test_a_heic_is_indexed_with_the_date_of_its_camera(library, tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    image = make_image(0, (48, 40))
    exif = image.getexif()
    exif.get_ifd(0x8769)[0x9003] = "2024:05:01 12:00:00"
    (tmp_path / "album").mkdir()
    with (tmp_path / "album" / "IMG_0001.HEIC").open("wb") as stream:
        pillow_heif.from_pillow(image).save(stream, format="HEIF", exif=exif.tobytes())
    assert counts(index(library, tmp_path / "album")) == {"new": 1, "embedded": 1}
    with opened(library) as folder:
        facts = folder.query("SELECT width, height, taken FROM images")
    assert facts == [(48, 40, "2024-05-01T12:00:00")]


def test_the_files_of_a_library_are_no_images_to_index(library, album, tmp_path):
    index(library, album)
    for inside in (library, library / "thumbnails"):
        with pytest.raises(UsageError, match="is in the library"):
            index(tmp_path / "other", inside)
        with pytest.raises(UsageError, match="is in the library"):
            index(library, inside)
    assert found_files(library).keys() == {f"{number}.jpg" for number in range(4)}


def test_connections_of_ended_threads_are_closed(library, album):
    index(library, album)
    with opened(library) as folder:
        folder.query("SELECT 1")
        for _unused in range(20):
            thread = threading.Thread(target=folder.query, args=("SELECT 1",))
            thread.start()
            thread.join()
        assert len(folder.database._open) <= 2
        assert folder.query("SELECT COUNT(*) FROM images") == [(4,)]


def test_a_watch_prints_a_line_of_json_after_each_change(
    library, album, tiny_checkpoint, monkeypatch, capsys
):
    monkeypatch.setattr(watching, "check_watchfiles", lambda: None)

    def changes_of(given, path):
        yield set()
        (album / "0.jpg").unlink()
        yield set()

    monkeypatch.setattr(watching, "changes_of", changes_of)
    words = ["index", str(album), "--library", str(library), "--model", str(tiny_checkpoint)]
    assert run([*words, "--watch", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [json.loads(line) for line in lines]
    assert [(each["new"], each["deleted"]) for each in found] == [(4, 0), (0, 1)]


def test_a_watch_reports_changes_of_images_but_not_of_the_library(album, monkeypatch):
    pytest.importorskip("watchfiles")
    monkeypatch.setattr(watching, "_DEBOUNCE", 50)
    library = album / "library"
    changes = watching.changes_of([roots.parse_root(str(album))], library)
    next(changes)  # it watches now
    index(library, album)  # writes to the library, in the watched folder
    (album / "while the caller is busy.jpg").write_bytes(jpeg(7))
    next(changes)
    assert counts(index(library)) == {"new": 1, "unchanged": 4, "embedded": 1}
    later_change = threading.Timer(0.5, (album / "0.jpg").unlink)
    later_change.start()
    start = time.perf_counter()
    next(changes)
    assert time.perf_counter() - start > 0.3  # its own writes were not reported
    assert counts(index(library)) == {"deleted": 1, "unchanged": 4}
    changes.close()


def test_a_writer_that_waits_goes_on_when_the_other_ends(library, album):
    index(library, album)
    holds, done = threading.Event(), threading.Event()

    def hold():
        with opened(library, writable=True) as folder, folder.writing("merge"):
            holds.set()
            time.sleep(0.3)
            done.set()

    thread = threading.Thread(target=hold)
    thread.start()
    assert holds.wait(10)
    with (
        opened(library, writable=True) as folder,
        pytest.warns(UserWarning, match="is being written by `cn-clip merge`"),
        folder.writing("index", wait=True),
    ):
        assert done.is_set()
    thread.join()


def test_a_number_above_the_integers_of_the_database_is_a_usage_error(library, album):
    index(library, album)
    with opened(library, writable=True) as folder:
        for image in (2**63, -(2**70)):
            with pytest.raises(UsageError, match="limit of the database"):
                image_bytes(folder, image)
            with pytest.raises(UsageError, match="limit of the database"):
                remove_images(folder, [1, image])
        assert folder.query("SELECT COUNT(*) FROM images") == [(4,)]


def test_what_a_library_has_lost_is_named_with_the_way_out(library, album):
    index(library, album)
    about, stored = library / "library.json", library / "library.db"
    content = about.read_bytes()
    about.write_text("{")
    with pytest.raises(LibraryError, match=r"library\.json is damaged; copy it from a backup"):
        index(library, album)
    about.write_bytes(content)
    stored.write_bytes(b"no database")
    with pytest.raises(LibraryError, match="restore a backup, or index again"):
        index(library, album)
    stored.unlink()
    with pytest.raises(LibraryError, match=r"has lost its library\.db; restore a backup"):
        index(library, album)


def test_a_lock_is_not_taken_for_damage(library, album, monkeypatch):
    index(library, album)
    monkeypatch.setattr(database, "_BUSY_SECONDS", 0.01)
    with sqlite3.connect(library / "library.db", isolation_level=None) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(LibraryError, match="busy"):
            problems(library)
        other.execute("ROLLBACK")
    other.close()
    assert problems(library) == []


def test_a_folder_that_is_gone_counts_its_images_only(library, album):
    (album / "broken.jpg").write_bytes(b"no image")
    assert counts(index(library, album)) == {"new": 4, "embedded": 4}
    shutil.rmtree(album)
    assert counts(index(library)) == {"unchanged": 4}


@pytest.mark.parametrize("source", ["nowhere", "csv:nowhere.csv", "kind:x", "/"])
def test_a_source_that_does_not_exist_is_not_kept(library, album, source):
    with pytest.raises((UsageError, DataError)):
        index(library, source)
    assert not library.exists()
    index(library, album)
    with pytest.raises((UsageError, DataError)):
        index(library, source)
    assert counts(index(library)) == {"unchanged": 4}  # it is not looked for again


def test_a_folder_that_is_replaced_is_watched_again(library, album, monkeypatch):
    pytest.importorskip("watchfiles")
    monkeypatch.setattr(watching, "_DEBOUNCE", 50)
    changes = watching.changes_of([roots.parse_root(str(album))], library)
    next(changes)
    album.rename(album.with_name("elsewhere"))
    photos(album, [7])
    next(changes)
    write = threading.Timer(0.3, (album / "8.jpg").write_bytes, (jpeg(8),))
    write.start()
    next(changes)
    write.join()
    changes.close()


def test_a_folder_without_images_says_which_files_are_images(library, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    words = ["index", str(tmp_path / "empty"), "--library", str(library), "--model", "mini"]
    assert run(words) == 1
    printed = capsys.readouterr().err
    assert "no image was found" in printed and ".jpg" in printed


def test_a_source_that_cannot_be_read_is_not_remembered(library, album, tmp_path):
    index(library, album)
    (tmp_path / "t").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        index(library, f"tar:{tmp_path / 't'}")
    with opened(library) as folder:
        assert len(folder.query("SELECT id FROM roots")) == 1


def test_of_copies_the_first_is_shown_whichever_is_decoded(library, tmp_path, monkeypatch):
    folder = photos(tmp_path / "copies", [1])
    (name,) = os.listdir(folder)
    shutil.copy(folder / name, folder / f"z{name}")
    read = indexing._Run._read

    def late(run, job):
        if job.entry.name == name.encode():
            time.sleep(0.3)
        return read(run, job)

    monkeypatch.setattr(indexing._Run, "_read", late)
    index(library, folder)
    with opened(library) as found:
        shown = found.query("SELECT name FROM files ORDER BY id")
    assert shown == [(name.encode(),), (f"z{name}".encode(),)]


def test_a_mistake_in_the_model_leaves_no_empty_library(album, library, capsys):
    assert run(["index", str(album), "--library", str(library), "--model", "no/model.pt"]) == 2
    assert "no/model.pt" in capsys.readouterr().err
    assert not library.exists()
