"""Vectors of a library for other programs, and a library from the vectors of others."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import cosines
from PIL import Image
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
from cn_clip.embeddings.files import read_embeddings
from cn_clip.errors import CNClipError, LibraryError, UsageError
from cn_clip.search import export, imports
from cn_clip.search.folder import LibraryFolder, create
from cn_clip.search.imports import import_embeddings
from cn_clip.search.reading import digest_of


@pytest.fixture
def album(tmp_path):
    folder = photos(tmp_path / "album", range(6))
    (folder / "copy.jpg").write_bytes(jpeg(0))
    return folder


@pytest.fixture
def library(tmp_path, album):
    index(tmp_path / "library", album)
    (album / "5.jpg").unlink()
    index(tmp_path / "library")
    with (
        opened(tmp_path / "library", writable=True) as folder,
        folder.database.transaction() as connection,
    ):
        connection.execute("UPDATE files SET caption = '一只猫' WHERE name = ?", (b"1.jpg",))
    return tmp_path / "library"


def exported(library, to, out, *more):
    return run(["library", "export", "--library", str(library), "--to", to, "--out", out, *more])


def in_order(library, album):
    """The searchable images: paths in order of ids, and their embeddings."""
    files = {image: name for name, image in sorted(found_files(library).items(), reverse=True)}
    names = [files[image] for image in sorted(files)]
    contents = [(album / name).read_bytes() for name in names]
    return names, embedder().embed_images(contents)


@pytest.mark.parametrize("to", ["npz", "clip-retrieval"])
def test_exported_embeddings_read_as_those_of_embed(library, album, tmp_path, to):
    pytest.importorskip("pyarrow")
    out = tmp_path / ("out.npz" if to == "npz" else "out")
    assert exported(library, to, str(out)) == 0
    stored = read_embeddings(out, "images")
    names, expected = in_order(library, album)
    assert len(stored.ids) == 5 and {*map(os.path.dirname, stored.ids)} == {str(album)}
    contents = [Path(path).read_bytes() for path in stored.ids]
    assert [digest_of(each) for each in contents] == [
        digest_of((album / name).read_bytes()) for name in names
    ]
    assert cosines(stored.vectors, expected).min() > 0.999
    np.testing.assert_allclose(np.linalg.norm(stored.vectors, axis=1), 1, atol=1e-6)
    if to == "clip-retrieval":
        import pyarrow.parquet as parquet

        table = parquet.read_table(out / "metadata" / "metadata_0.parquet").to_pydict()
        assert table["caption"].count("一只猫") == 1 and table["width"] == [48] * 5
    assert exported(library, to, str(out)) == 2
    assert exported(library, to, str(out), "--overwrite") == 0


def test_exported_parquet_has_facts_and_vectors(library, album, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = str(tmp_path / "out.parquet")
    assert exported(library, "parquet", out) == 0
    table = parquet.read_table(out)
    columns = table.to_pydict()
    _names, expected = in_order(library, album)
    assert cosines(np.array(columns["vector"]), expected).min() > 0.999
    assert columns["image_id"] == sorted(columns["image_id"]) and columns["height"] == [40] * 5
    assert table.schema.metadata[b"model"] == b"tiny"
    assert exported(library, "parquet", out) == 2
    assert exported(library, "parquet", out, "--overwrite") == 0
    parquet.write_table(table.replace_schema_metadata({}), out)
    assert exported(library, "parquet", out, "--overwrite") == 2  # not ours


def test_an_export_reads_facts_in_small_parts_of_one_state(library, album, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    whole, out = str(tmp_path / "whole.parquet"), str(tmp_path / "out.parquet")
    assert exported(library, "parquet", whole) == 0
    read, sizes = export._Table._read, []

    def in_parts(table, ids):
        sizes.append(len(ids))
        if len(sizes) == 1:  # another process goes on in the meantime
            photos(album, [0, 5, 7, 8])
            (album / "2.jpg").unlink()
            threads = [threading.Thread(target=index, args=(library,))]
            threads[0].start()
            threads[0].join()
        return read(table, ids)

    monkeypatch.setattr(export, "TOGETHER", 2)
    monkeypatch.setattr(export._Table, "_read", in_parts)
    assert exported(library, "parquet", out) == 0
    assert sizes == [2, 2, 1]
    assert parquet.read_table(out).equals(parquet.read_table(whole))
    assert len(vectors_of(library)) == 7


def test_outputs_that_do_not_fit_are_refused(library, tmp_path, capsys):
    for to, out in (("npz", "x.parquet"), ("parquet", "x"), ("clip-retrieval", "x.npz")):
        assert exported(library, to, str(tmp_path / out)) == 2
        assert "does not fit --to" in capsys.readouterr().err
    assert exported(library, "npz", str(library / "x.npz")) == 2
    create(tmp_path / "empty")
    assert exported(tmp_path / "empty", "npz", str(tmp_path / "x.npz")) == 1


MILVUS = """
import json, sys, warnings
warnings.simplefilter("ignore")
from cn_clip.cli import run
library, out = sys.argv[1:]
words = ["library", "export", "--library", library, "--to", "milvus", "--out", out]
codes = [run(words), run(words), run([*words, "--overwrite"])]
import numpy as np
from pymilvus import MilvusClient
from cn_clip.search.folder import LibraryFolder
client = MilvusClient(out)
client.load_collection("cn_clip")
with LibraryFolder(__import__("pathlib").Path(library)) as opened:
    snapshot = opened.snapshot()
    ids = [i for (i,) in opened.query("SELECT id FROM images WHERE files > 0 ORDER BY id")]
    queries = [snapshot.vectors[i - 1].astype(np.float32).tolist() for i in ids]
found = client.search("cn_clip", data=queries, limit=1, output_fields=["path", "caption", "width"])
hits = [[hit["id"], hit["distance"], dict(hit["entity"])] for (hit,) in found]
client.create_collection("other", dimension=4)
codes.append(run([*words, "--collection", "other", "--overwrite"]))
client.close()
print("RESULT", json.dumps({"codes": codes, "ids": ids, "hits": hits}))
"""


def test_milvus_finds_every_exported_image_by_its_vector(library, tmp_path):
    pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    done = subprocess.run(  # it starts threads and a server of its own
        [sys.executable, "-c", MILVUS, str(library), str(tmp_path / "milvus.db")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr
    result = json.loads(lines[0].removeprefix("RESULT "))
    assert result["codes"] == [0, 2, 0, 2], done.stderr
    assert [number for number, *_ in result["hits"]] == result["ids"]
    assert all(abs(score - 1) < 0.01 for _, score, _ in result["hits"])
    entities = [entity for *_, entity in result["hits"]]
    assert all(os.path.exists(each["path"]) and each["width"] == 48 for each in entities)


# Import.


def embedded(tmp_path, album, out, *more):
    from cn_clip.embeddings.extract import extract
    from cn_clip.embeddings.inputs import read_images

    extract(embedder(), "images", read_images([str(album)]), tmp_path / out)
    return tmp_path / out


def imported(library, path, **options):
    create(library)
    with LibraryFolder(library, writable=True) as folder, folder.writing("library import"):
        return import_embeddings(folder, path, embedder, model="tiny", **options)


@pytest.mark.parametrize("out", ["x.npz", "x.jsonl", "x"])
def test_an_imported_library_is_like_an_indexed_one(album, tmp_path, out):
    pytest.importorskip("pyarrow")
    library = tmp_path / "library"
    done = imported(library, embedded(tmp_path, album, out))
    assert (done.images, done.files, done.changed, done.copies) == (6, 7, 0, 1)
    index(tmp_path / "indexed", album)
    ours, theirs = vectors_of(library), vectors_of(tmp_path / "indexed")
    assert ours.keys() == theirs.keys()
    assert all(ours[key] @ theirs[key] > 0.999 for key in ours)
    facts = "SELECT digest, bytes, width, height, taken FROM images ORDER BY digest"
    with opened(library) as one, opened(tmp_path / "indexed") as two:
        assert one.query(facts) == two.query(facts)
    assert problems(library, all_files=True) == []
    again = index(library).progress  # the root is the folder: nothing is embedded again
    assert (again.embedded, again.unchanged) == (0, 7)


def test_embeddings_in_the_place_of_a_library_name_the_way_to_one(album, tmp_path):
    pytest.importorskip("pyarrow")
    for out in ("x.npz", "x"):
        with pytest.raises(LibraryError, match="cn-clip library import"):
            opened(embedded(tmp_path, album, out))


def test_an_export_can_be_imported(album, tmp_path):
    index(tmp_path / "library", album)
    out = tmp_path / "x.npz"
    assert exported(tmp_path / "library", "npz", str(out)) == 0
    imported(tmp_path / "again", out)
    assert vectors_of(tmp_path / "again").keys() == vectors_of(tmp_path / "library").keys()


def test_imported_images_are_compared_by_their_files(album, tmp_path, capsys):
    with Image.open(album / "3.jpg") as image:
        image.resize((64, 53)).save(album / "resized.png")
    library, path = tmp_path / "library", embedded(tmp_path, album, "x.npz")
    imported(library, path)
    (album / "4.jpg").unlink()
    words = ["library", "duplicates", "--library", str(library)]
    assert run([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    groups = [
        sorted(os.path.basename(path) for each in group for path in each["paths"])
        for group in found["groups"]
    ]
    assert sorted(groups) == [["0.jpg", "copy.jpg"], ["3.jpg", "resized.png"]]
    assert found["not_compared"] == 1
    assert run(words) == 0
    assert "1 image is not compared" in capsys.readouterr().err


def test_images_without_a_file_keep_their_vector_and_name(album, tmp_path):
    library, path = tmp_path / "library", embedded(tmp_path, album, "x.npz")
    for name in ("1.jpg", "2.jpg"):
        (album / name).unlink()
    done = imported(library, path)
    assert (done.images, done.files) == (6, 5)
    assert len(vectors_of(library)) == 6
    files = found_files(library)
    assert str(album / "1.jpg") in files and "0.jpg" in files
    assert index(library).progress.deleted == 0 and len(vectors_of(library)) == 6
    assert problems(library, all_files=True) == []


def test_files_that_changed_since_are_embedded_again(album, tmp_path):
    library, path = tmp_path / "library", embedded(tmp_path, album, "x.npz")
    (album / "1.jpg").write_bytes(jpeg(9))
    later = path.stat().st_mtime_ns + 10**9
    os.utime(album / "1.jpg", ns=(later, later))
    assert imported(library, path).changed == 1
    assert len(vectors_of(library)) == 5
    assert index(library).progress.embedded == 1
    vector = np.float32(vectors_of(library)[digest_of(jpeg(9))])
    assert vector @ embedder().embed_images(jpeg(9))[0] > 0.999


def test_embeddings_of_another_or_an_unknown_model_are_verified(album, tmp_path):
    path = embedded(tmp_path, album, "x.npz")
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    del arrays["about"]
    np.savez(path, **arrays)
    assert imported(tmp_path / "a", path).images == 6  # the same vectors
    arrays["embeddings"] = arrays["embeddings"][::-1]
    np.savez(path, **arrays)
    with pytest.raises(LibraryError, match="made by another model"):
        imported(tmp_path / "b", path)
    arrays["ids"] = np.array([f"http://x/{n}" for n in range(7)])
    np.savez(path, **arrays)
    with pytest.raises(LibraryError, match="none of its images is at hand"):
        imported(tmp_path / "c", path)
    arrays["embeddings"] = arrays["embeddings"][:, :20]
    np.savez(path, **arrays)
    with pytest.raises(LibraryError, match="20 values"):
        imported(tmp_path / "d", path)
    assert imported(tmp_path / "c", embedded(tmp_path, album, "y.npz")).images == 6
    with pytest.raises(UsageError, match="holds images"):
        imported(tmp_path / "c", tmp_path / "y.npz")


def test_many_folders_become_few_roots(tmp_path, monkeypatch):
    for number in range(20):
        photos(tmp_path / "photos" / f"{number:02}", [number])
    imported(tmp_path / "library", embedded(tmp_path, tmp_path / "photos", "x.npz"))
    with opened(tmp_path / "library") as folder:
        assert folder.query("SELECT location FROM roots") == [(os.fsencode(tmp_path / "photos"),)]
    monkeypatch.setattr(imports, "_ROOTS", 20)
    imported(tmp_path / "other", tmp_path / "x.npz")
    with opened(tmp_path / "other") as folder:
        assert folder.query("SELECT COUNT(*) FROM roots") == [(20,)]


def test_an_interrupted_import_starts_over(album, tmp_path, monkeypatch):
    path = embedded(tmp_path, album, "x.npz")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(imports, "_roots", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        imported(tmp_path / "library", path)
    assert imported(tmp_path / "library", path).images == 6
    assert problems(tmp_path / "library") == []


def test_import_on_the_command_line(album, tmp_path, tiny_checkpoint, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(tiny_checkpoint), "--device", "cpu"]
    assert run(["embed", "images", "album", "--out", "x.npz", *model]) == 0
    words = ["library", "import", "x.npz", "--library", "./library"]
    capsys.readouterr()
    assert run([*words, *model]) == 0
    assert "6 images imported, 7 of them with a file here" in capsys.readouterr().out
    assert len(vectors_of(tmp_path / "library")) == 6
    assert run(["library", "import", "no.npz", "--library", "./other"]) == 2
    assert not (tmp_path / "other").exists()
    with pytest.raises(CNClipError):
        opened(tmp_path / "other")
