"""``data split``: nothing leaks, counts are right, and the parts hold the pairs of the source."""

import csv
import itertools
import json

import numpy as np
import pytest
from conftest import make_image
from data.formats import jpeg

from cn_clip.cli import run
from cn_clip.data.curate.grouping import connected
from cn_clip.data.sources.open import open_source
from cn_clip.data.split import Sizes, split
from cn_clip.errors import CNClipError, UsageError

LONG = "一件{}色的连衣裙"


def write_shop(folder, count=30):
    """Write ``count`` images with captions; 0 and 1 look alike, 2 and 3 have an equal caption, and
    so do 3 and 4 by another one: 2, 3 and 4 belong together."""
    folder.mkdir(exist_ok=True)
    rows = []
    for n in range(count):
        image = make_image(0 if n == 1 else n, (96, 80) if n == 1 else (160, 120))
        image.save(folder / f"{n}.jpg", quality=80 if n == 1 else 95)
        rows.append((f"{n}.jpg", LONG.format(chr(0x4E00 + n))))
    rows += [("2.jpg", "春季新款，百搭"), ("3.jpg", "春季新款 百搭")]
    rows += [("3.jpg", "夏季新款短裙"), ("4.jpg", "夏季新款短裙。")]
    write_rows(folder / "products.csv", rows)
    return rows


def write_rows(path, rows, encoding="utf-8"):
    with path.open("w", encoding=encoding, newline="") as stream:
        csv.writer(stream).writerows([("image", "caption"), *rows])


def ids_of(uri):
    source = open_source(uri)
    return {source.row(index).image_id for index in range(len(source))}


def pairs_of(uri):
    source = open_source(uri)
    return sorted((source.row(n).image_id, source.row(n).text) for n in range(len(source)))


@pytest.mark.parametrize("to", ["csv", "tar"])
def test_what_would_leak_is_on_one_side(tmp_path, to):
    rows = write_shop(tmp_path / "shop")
    source = open_source(f"csv:{tmp_path}/shop/products.csv")
    sides = set()
    for seed in range(6):
        result = split(source, tmp_path / f"{seed}", sizes=Sizes(0.2, 0.2), to=to, seed=seed)
        parts = {name: ids_of(part.source) for name, part in result.parts.items()}
        assert [len(parts[name]) for name in ("train", "val", "test")] == [18, 6, 6]
        for group in (("0", "1"), ("2", "3", "4")):
            names = {f"{n}.jpg" for n in group}
            homes = [name for name, ids in parts.items() if names & ids]
            assert len(homes) == 1
            sides.add((group, homes[0]))
        together = itertools.chain(*(pairs_of(part.source) for part in result.parts.values()))
        assert sorted(together) == sorted(rows)
        assert (result.near_duplicates, result.equal_captions, result.skipped) == (1, 2, [])
    assert len(sides) > 2, "the seed does not matter"


def test_without_comparisons_the_same_shop_leaks(tmp_path):
    """The oracle of the test above: with the comparisons off, some seed separates the groups."""
    write_shop(tmp_path / "shop")
    source = open_source(f"csv:{tmp_path}/shop/products.csv")
    leaks = set()
    for seed in range(6):
        result = split(
            source, tmp_path / f"{seed}", sizes=Sizes(0.4), seed=seed, threshold=0, min_caption=0
        )
        for group in (("0", "1"), ("2", "3", "4")):
            homes = [
                name
                for name, part in result.parts.items()
                if {f"{n}.jpg" for n in group} & ids_of(part.source)
            ]
            leaks |= {group} if len(homes) > 1 else set()
    assert len(leaks) == 2


def test_the_order_of_the_rows_does_not_matter(tmp_path):
    rows = write_shop(tmp_path / "shop")
    parts = []
    for order in (rows, rows[::-1]):
        write_rows(tmp_path / "shop" / "products.csv", order)
        source = open_source(f"csv:{tmp_path}/shop/products.csv")
        result = split(source, tmp_path / "out", sizes=Sizes(0.2), overwrite=True)
        parts.append(ids_of(result.parts["val"].source))
    assert parts[0] == parts[1]


def test_awkward_captions_and_names_come_back(tmp_path, monkeypatch):
    folder = tmp_path / "我的 照片,1"
    folder.mkdir()
    captions = [
        '说"好"',
        "a,b;c",
        "两\n行",
        " 空格 ",
        "=1+1",
        "\u2028分隔",
        "😀",
        "x" * 500,
        "甲",
        "乙",
    ]
    for n in range(len(captions)):
        (folder / f"图 {n},.jpg").write_bytes(jpeg(n))
    write_rows(folder / "list.csv", [(f"图 {n},.jpg", c) for n, c in enumerate(captions)])
    monkeypatch.chdir(tmp_path)
    source = open_source(f"csv:{folder}/list.csv")
    result = split(source, "out/deeper", sizes=Sizes(3))
    monkeypatch.chdir("out")  # the paths in the parts are relative to the parts
    read = []
    for name, part in result.parts.items():
        opened = open_source(f"csv:deeper/{name}.csv")
        assert len(opened) == part.pairs
        read += [(opened.row(n).text, opened.image(n)) for n in range(len(opened))]
    expected = [(caption, jpeg(n)) for n, caption in enumerate(captions)]
    assert sorted(read) == sorted(expected)


def test_images_that_are_no_files_are_copied(tmp_path, capsys):
    write_shop(tmp_path / "shop")
    shop = f"{tmp_path}/shop/products.csv"
    assert run(["data", "pack", shop, "--out", f"{tmp_path}/shards", "--workers", "0"]) == 0
    words = ["data", "split", f"{tmp_path}/shards/*.tar", "--workers", "0"]
    assert run([*words, "--to", "csv", "--out", f"{tmp_path}/no"]) == 2
    assert "give --to tar" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert run([*words, "--out", f"{tmp_path}/parts", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["to"] == "tar" and told["parts"]["val"]["images"] == 3
    together = [pairs_of(f"tar:{tmp_path}/parts/{name}/*.tar") for name in ("train", "val")]
    assert sorted(itertools.chain(*together)) == pairs_of(f"tar:{tmp_path}/shards/*.tar")


def test_the_command_counts_and_lists_what_it_leaves_out(tmp_path, capsys):
    rows = write_shop(tmp_path / "shop")
    (tmp_path / "shop" / "9.jpg").write_bytes(b"no image")
    write_rows(tmp_path / "shop" / "products.csv", [*rows, ("none.jpg", "没有"), ("5.jpg", " ")])
    code = run(
        ["data", "split", f"{tmp_path}/shop/products.csv", "--out", f"{tmp_path}/out", "--val", "5",
         "--workers", "0"]
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 1
    assert "products.csv, line 11: " in err and "none.jpg" in err and "its text is empty" in err
    assert "1 near-duplicate" in out and "2 captions" in out and "3 pairs left out" in out
    assert len(ids_of(f"{tmp_path}/out/val.csv")) == 5
    assert len(ids_of(f"{tmp_path}/out/train.csv")) == 24


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--val", "-1"], "--val is -1; give a fraction"),
        (["--val", "1.5"], "--val is 1.5; give a fraction"),
        (["--val", "nan"], "--val is nan"),
        (["--test", "0.95"], "leave none of 30 images for training"),
        (["--val", "40"], "leave none of 30 images for training"),
        (["--threshold", "500"], "500 bits of 256"),
        (["--val", "x"], "--val"),
    ],
)
def test_bad_sizes_are_refused(tmp_path, capsys, options, words):
    write_shop(tmp_path / "shop")
    command = ["data", "split", f"{tmp_path}/shop/products.csv", "--workers", "0"]
    assert run([*command, "--out", f"{tmp_path}/out", *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_that_all_hang_together_cannot_be_split(tmp_path):
    write_shop(tmp_path / "shop", 8)
    rows = [(f"{n}.jpg", "全场包邮，七天退换") for n in range(8)]
    write_rows(tmp_path / "shop" / "products.csv", rows)
    source = open_source(f"csv:{tmp_path}/shop/products.csv")
    with pytest.raises(UsageError, match="join 8 of 8 images; raise --min-caption"):
        split(source, tmp_path / "out")
    assert len(split(source, tmp_path / "out", min_caption=20).parts) == 2


def test_a_source_without_usable_pairs_is_refused(tmp_path, capsys):
    for rows, words in (([], "holds no pair"), ([("none.jpg", "猫")], "no usable pair; the first")):
        write_rows(tmp_path / "products.csv", rows)
        command = ["data", "split", f"{tmp_path}/products.csv", "--out", f"{tmp_path}/out"]
        assert run([*command, "--workers", "0"]) in (1, 2)
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(tmp_path, full_disk):
    folder = tmp_path / "shop"
    folder.mkdir()
    for n in range(30):
        (folder / f"{n}.jpg").write_bytes(jpeg(n, (500, 400)))
    write_rows(folder / "products.csv", [(f"{n}.jpg", chr(0x4E00 + n)) for n in range(30)])
    source = open_source(f"csv:{folder}/products.csv")
    with pytest.raises(CNClipError, match="could not write"):
        split(source, tmp_path / "out", to="tar", threshold=0)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".cache") == ["shop"]


def test_components_are_those_of_a_search():
    rng = np.random.default_rng(0)
    for count, links in ((1, 0), (6, 3), (50, 30), (200, 400)):
        edges = rng.integers(0, count, (2, links))
        neighbours = {n: {n} for n in range(count)}
        for a, b in edges.T.tolist():
            neighbours[a].add(b)
            neighbours[b].add(a)
        expected = np.full(count, -1)
        for start in range(count):
            queue = [start] if expected[start] < 0 else []
            while queue:
                node = queue.pop()
                if expected[node] < 0:
                    expected[node] = start
                    queue += neighbours[node]
        assert connected(count, edges).tolist() == expected.tolist()
