"""Searches of a library of real images by the embedded model."""

import base64
import io
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

import cn_clip
import cn_clip.search as searching
from cn_clip.cli import run
from cn_clip.cli.inline_images import escape_sequence
from cn_clip.embedder import Embedder
from cn_clip.errors import LibraryError, UsageError
from cn_clip.sample import embedded_sample
from cn_clip.search.background import phrase_tail
from cn_clip.search.confidence import background_words
from cn_clip.search.filters import Filters
from cn_clip.search.folder import CACHE, LibraryFolder, create
from cn_clip.search.images import image_bytes, thumbnail_of
from cn_clip.search.roots import parse_root
from cn_clip.search.updating import update
from cn_clip.search.words import rebuild_words


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for path in embedded_sample().images:
        kind = "photos" if path.name.startswith("photo") else "drawings"
        (folder / kind).mkdir(exist_ok=True)
        shutil.copy(path, folder / kind)
    rows = zip(embedded_sample().images, embedded_sample().captions, strict=True)
    lines = [f"{path},{caption}\n" for path, caption in rows if "rocket" in path.name]
    (folder / "captions.csv").write_text("image,text\n" + "".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def library(photos, tmp_path_factory):
    path = tmp_path_factory.mktemp("libraries") / "photos"
    create(path)
    with LibraryFolder(path, writable=True) as folder, folder.writing("index"):
        roots = [parse_root(str(photos)), parse_root(f"csv:{photos}/captions.csv")]
        done = update(folder, roots, cn_clip.load)
    assert done.progress.embedded == 47 and not done.progress.failed
    return path


@pytest.fixture(scope="module")
def opened(library):
    with searching.open(library) as opened:
        yield opened


def names(hits):
    return [hit.path.rpartition("/")[2] for hit in hits]


def test_a_text_finds_the_images_that_numpy_finds(opened, photos):
    embedder = cn_clip.load()
    paths = [str(path) for path in sorted(photos.rglob("*.jpg"))]
    cosines = embedder.embed_images(paths) @ embedder.embed_texts("一辆汽车")[0]
    hits = opened.search("一辆汽车", k=47)
    assert len(opened) == len(hits) == 47
    by_path = dict(zip(paths, cosines.tolist(), strict=True))
    found = {hit.path: hit.cosine for hit in hits}
    assert found == pytest.approx(by_path, abs=2e-3)  # float16
    assert [hit.cosine for hit in hits] == sorted(found.values(), reverse=True)


def test_a_cat_is_found_and_an_excavator_is_not(opened):
    cats = opened.search("一只猫", k=4)
    assert all("cat" in name for name in names(cats)) and all(hit.matches for hit in cats)
    assert all(0.5 < hit.probability < 1 for hit in cats)
    excavators = opened.search("挖掘机", k=4)
    assert len(excavators) == 4 and not any(hit.matches for hit in excavators)


def test_words_of_a_caption_find_its_image_whatever_it_looks_like(opened, photos):
    caption = next(
        caption
        for path, caption in zip(embedded_sample().images, embedded_sample().captions, strict=True)
        if path.name == "photo-rocket-2.jpg"
    )
    best = opened.search(caption, k=1)[0]
    assert names([best]) == ["photo-rocket-2.jpg"]
    assert "caption" in best.why and best.caption == caption and best.matches


def test_an_image_finds_itself_first_by_path_and_by_id(opened, photos):
    path = photos / "photos" / "photo-coffee-1.jpg"
    first = opened.search(images=[path], k=3)[0]
    assert names([first]) == [path.name] and first.cosine == pytest.approx(1, abs=1e-3)
    assert names(opened.search(like=[first.id], k=3)) == names(opened.search(images=[path], k=3))


def test_a_file_and_a_row_of_a_table_with_one_content_are_one_hit(opened, photos):
    hits = opened.search("火箭", k=47)
    assert len(hits) == 47
    rockets = [hit for hit in hits if "rocket" in hit.path]
    assert len(rockets) == 4
    for hit in rockets:
        (copy,) = hit.copies
        assert {hit.path.startswith("csv:"), copy.startswith("csv:")} == {True, False}
        assert names([hit]) == [copy.rpartition("/")[2]]


@pytest.mark.parametrize("query", ["一只猫", "建筑", "红色"])
def test_a_filter_gives_what_filtering_all_results_gives(opened, photos, query):
    every = opened.search(query, k=47)
    inside = opened.search(query, k=5, filters=Filters(folder=photos / "drawings"))
    expected = [hit for hit in every if "/drawings/" in hit.path][:5]
    assert [hit.id for hit in inside] == [hit.id for hit in expected]
    large = opened.search(query, k=47, filters=Filters(min_side=200))
    assert [hit.id for hit in large] == [h.id for h in every if min(h.width, h.height) >= 200]


@pytest.mark.parametrize(
    "filters",
    [
        Filters(after="0001", before="9999"),
        Filters(before="9999-12-31"),
        Filters(after="1970", before="9999-12"),
        Filters(max_bytes=10**30, min_bytes=-(10**30), min_side=-(2**80)),
    ],
)
def test_the_widest_filters_exclude_nothing(opened, filters):
    assert len(opened.search("猫", k=47, filters=filters)) == 47


def test_limits_above_all_integers_of_the_database_exclude_all(opened):
    assert opened.search("猫", filters=Filters(min_side=10**30)) == []
    assert opened.search("猫", filters=Filters(min_bytes=2**64)) == []


def test_a_hit_has_the_uri_of_its_file(opened, photos):
    hits = opened.search("一只猫", k=47)
    for hit in hits:
        is_file = not hit.path.startswith("csv:")
        assert hit.uri == (Path(hit.path).as_uri() if is_file else None)


def test_filters_without_a_result_give_an_empty_list(opened):
    assert opened.search("猫", filters=Filters(after="2999")) == []
    assert opened.search("猫", filters=Filters(caption="不存在的词")) == []


@pytest.mark.parametrize(
    ("filters", "named"),
    [
        (Filters(after="2024-13"), "2024-13"),
        (Filters(before="yesterday"), "yesterday"),
        (Filters(after="2024-00"), "2024-00"),
        (Filters(before="2024-05-00"), "2024-05-00"),
        (Filters(folder="/nowhere"), "/nowhere"),
        (Filters(folder="~nobody-has-this-name/x"), "nobody-has-this-name"),
        (Filters(caption="，。"), "，。"),
    ],
)
def test_a_filter_that_means_nothing_is_refused(opened, filters, named):
    with pytest.raises(UsageError, match=named):
        opened.search("猫", filters=filters)


@pytest.mark.parametrize(("query", "k"), [("", 10), ("   ", 10), ("-猫", 10), ("猫", 0)])
def test_an_empty_or_negative_query_is_refused(opened, query, k):
    with pytest.raises(UsageError):
        opened.search(query, k=k)


def test_an_id_that_is_not_there_is_refused(opened):
    with pytest.raises(UsageError, match="48"):
        opened.search(like=[48])


def test_threads_get_the_results_of_one(opened):
    queries = ["一只猫", "火箭", "咖啡", "建筑"] * 4
    expected = [names(opened.search(query, k=5)) for query in queries]
    found = [None] * len(queries)

    def work(number):
        found[number] = names(opened.search(queries[number], k=5))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(queries))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_an_open_library_sees_what_another_connection_adds_and_hides(photos, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(photos / "photos", folder)
    create(tmp_path / "library")
    roots = [parse_root(str(folder))]
    with LibraryFolder(tmp_path / "library", writable=True) as writer:
        with writer.writing("index"):
            update(writer, roots, cn_clip.load)
        with searching.open(tmp_path / "library") as reader:
            assert len(reader) == 16
            Image.new("RGB", (64, 64), "red").save(folder / "red.png")
            (folder / "photo-cat-0.jpg").unlink()
            with writer.writing("index"):
                update(writer, roots, cn_clip.load)
            assert len(reader) == 16
            found = names(reader.search("红色", k=16))
            assert "red.png" in found and "photo-cat-0.jpg" not in found


def test_a_file_deleted_after_indexing_stays_in_the_results_with_its_thumbnail(library, tmp_path):
    shutil.copytree(library, tmp_path / "copy")
    folder = LibraryFolder(tmp_path / "copy", writable=True)
    with folder, folder.database.transaction() as connection:
        connection.execute("UPDATE roots SET location = CAST('/gone/' || kind AS BLOB)")
    with searching.open(tmp_path / "copy") as opened:
        hit = opened.search("一只猫", k=1)[0]
        assert hit.path.startswith("/gone/folder/")
        assert thumbnail_of(opened.folder, hit.id).startswith(b"RIFF")
        with pytest.raises(LibraryError, match="cannot be read"):
            image_bytes(opened.folder, hit.id)


def test_words_are_folded_again_when_folding_changes(photos, tmp_path, monkeypatch):
    create(tmp_path / "library")
    roots = [parse_root(f"csv:{photos}/captions.csv")]
    monkeypatch.setattr("cn_clip.search.fulltext.have_opencc", lambda: False)
    with LibraryFolder(tmp_path / "library", writable=True) as folder:
        with folder.writing("index"):
            update(folder, roots, cn_clip.load)
        with folder.database.transaction() as connection:  # as a caption in traditional characters
            connection.execute("UPDATE files SET caption = '發射火箭'")
        rebuild_words(folder)
        with searching.open(tmp_path / "library") as opened:
            assert opened.search("火箭", filters=Filters(caption="發射"))
            assert not opened.search("火箭", filters=Filters(caption="发射"))
            monkeypatch.undo()
            with folder.writing("index"):
                update(folder, [], cn_clip.load)
            assert opened.search("火箭", filters=Filters(caption="发射"))


def test_the_words_of_a_read_only_library_are_embedded_once(library, tmp_path, monkeypatch):
    path = shutil.copytree(library, tmp_path / "library")
    shutil.rmtree(path / CACHE, ignore_errors=True)
    (path / CACHE).write_bytes(b"")  # no folder can be made here, by root either
    embedder, embedded = cn_clip.load(), []
    embed_texts = Embedder.embed_texts

    def counted(self, texts):
        embedded.append(len(texts))
        return embed_texts(self, texts)

    monkeypatch.setattr(Embedder, "embed_texts", counted)
    with LibraryFolder(path) as folder:
        first = phrase_tail(folder, folder.snapshot(), embedder)
        assert phrase_tail(folder, folder.snapshot(), embedder) == first
    assert embedded == [len(background_words())]


def test_the_images_of_a_search_are_shown_in_a_terminal_only(library, monkeypatch):
    class Output(io.StringIO):
        terminal = True

        def isatty(self):
            return self.terminal

    def shown(*words, terminal=True):
        stdout = Output()
        stdout.terminal = terminal
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            assert run(["search", "火箭", "--library", str(library), "--top", "3", *words]) == 0
        return re.findall(r"\x1b]1337;File=inline=1;[^:]*:([^\a]*)\a\n(\d+)\n", stdout.getvalue())

    found = shown("--thumbnails")
    assert len(found) == 3
    with LibraryFolder(library) as folder:
        for encoded, image in found:
            inline = Image.open(io.BytesIO(base64.b64decode(encoded)))
            with Image.open(io.BytesIO(thumbnail_of(folder, int(image)))) as expected:
                assert inline.format == "PNG"
                assert inline.convert("RGB").tobytes() == expected.convert("RGB").tobytes()
    assert shown() == shown("--thumbnails", terminal=False) == []
    assert escape_sequence(b"RIFF") == ""
