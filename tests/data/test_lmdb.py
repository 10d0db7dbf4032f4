"""The official LMDB: held against the lmdb library, against damage and against hostile pickles."""

import base64
import os
import pickle
import pickletools
import random
import shutil
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import lmdb
import pytest
from data.formats import IMAGES, PAIRS, WRITERS, jpeg, put, read_pair
from hypothesis import example, given
from hypothesis import strategies as st

from cn_clip.cli import run
from cn_clip.data.curate.check import check
from cn_clip.data.sources.lmdb import write_lmdb
from cn_clip.data.sources.lmdb_file import LmdbFile
from cn_clip.data.sources.open import open_source
from cn_clip.data.sources.pickled_pair import parse_pickled_pair
from cn_clip.data.sources.tar import Sample
from cn_clip.errors import CNClipError, DataError

PAGE = 4096


# The file, held against the library


def drawn(folder, rng):
    """Write an LMDB in several transactions, with keys of all lengths, values of all sizes, and
    keys taken out again; return all keys it ever had."""
    keys = []
    with lmdb.open(str(folder), map_size=1 << 26, lock=False) as environment:
        for _ in range(rng.randint(1, 4)):
            with environment.begin(write=True) as transaction:
                new = [
                    rng.choice([str(rng.randint(0, 2000)).encode(), rng.randbytes(number)])
                    for number in (rng.randint(1, 400) for _ in range(rng.randint(1, 400)))
                ]
                for key in new:
                    size = rng.choice([0, 1, 10, 100, 2000, 3000, 9000])
                    transaction.put(key, rng.randbytes(size))
                for key in new[: rng.choice([0, rng.randint(0, len(new))])]:
                    transaction.delete(key)
            keys += new
    return keys


@pytest.mark.parametrize("seed", range(10))
def test_every_value_is_the_one_that_the_lmdb_library_returns(seed, tmp_path):
    rng = random.Random(seed)
    keys = drawn(tmp_path / "db", rng)
    file = LmdbFile(tmp_path / "db" / "data.mdb")
    with lmdb.open(str(tmp_path / "db"), readonly=True, lock=False) as environment:
        assert file.entries == environment.stat()["entries"]
        with environment.begin() as transaction:
            for key in [*keys, *(rng.randbytes(3) for _ in range(50))]:
                assert file.get(key) == transaction.get(key)
    assert file.get(b"") is None and file.get(b"k" * 600) is None


def test_an_empty_lmdb_has_no_value(tmp_path):
    lmdb.open(str(tmp_path / "db"), lock=False).close()
    file = LmdbFile(tmp_path / "db" / "data.mdb")
    assert (file.entries, file.get(b"a")) == (0, None)


def test_a_file_without_its_unused_last_pages_is_read(tmp_path):
    """LMDB does not write what a transaction took back, but its meta page counts it."""
    with lmdb.open(str(tmp_path / "db"), map_size=1 << 24, lock=False) as environment:
        for first in (0, 20, 40, 60):
            with environment.begin(write=True) as transaction:
                for number in range(first, first + 80):
                    transaction.put(b"%d" % number, bytes(9000))
                for number in range(first + 20, first + 80):
                    transaction.delete(b"%d" % number)
    path = tmp_path / "db" / "data.mdb"
    pages = path.stat().st_size // PAGE
    assert pages < stated_pages(path)
    assert all_read(path)
    while all_read(path):
        os.truncate(path, path.stat().st_size - 4 * PAGE)
    assert 20 < path.stat().st_size // PAGE < pages


def all_read(path):
    try:
        file = LmdbFile(path)
    except DataError as error:
        assert "is truncated" in str(error)
        return False
    assert all(file.get(b"%d" % number) == bytes(9000) for number in range(80))
    return True


def stated_pages(path):
    content = path.read_bytes()
    stated = [struct.unpack_from("<QQ", content, start + 136) for start in (0, PAGE)]
    return max(stated, key=lambda last_and_transaction: last_and_transaction[1])[0] + 1


def test_threads_read_an_lmdb_at_once(pictures):
    source = open_source(WRITERS["lmdb"](pictures))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda n: read_pair(source, n % 4), range(200)))
    assert [(p.image_id, p.text_id, p.text) for p in read] == PAIRS * 50
    assert all(pair.image == IMAGES[pair.image_id] for pair in read)


# Damage


@pytest.fixture
def packed(pictures):
    """A folder with an LMDB of the four pairs."""
    WRITERS["lmdb"](pictures)
    return pictures / "lmdb"


@pytest.mark.parametrize("part", ["imgs", "pairs"])
def test_a_truncated_file_is_reported(packed, part):
    path = packed / part / "data.mdb"
    whole, used = path.read_bytes(), stated_pages(path)
    for size in (used * PAGE - 1, PAGE * 3, PAGE * 2, PAGE, 152):
        path.write_bytes(whole[:size])
        stated = used if size >= 2 * PAGE else 2  # what is stated may be what is cut off
        sentence = (
            rf"{part}/data.mdb is truncated \(the meta page says {stated} pages, the file has "
            rf"{size // PAGE}\); copy it again"
        )
        with pytest.raises(DataError, match=sentence):
            open_source(f"lmdb:{packed}")
        assert_named(packed)


def assert_named(folder):
    with pytest.raises(DataError, match=r"data\.mdb"):
        check(open_source(f"lmdb:{folder}"), workers=0)


@pytest.mark.parametrize(
    ("starts", "content", "sentence"),
    [
        ((16,), b"\0\0\0\0", "is not an LMDB"),
        ((16,), b"\xbe\xef\xc0\xde", "of a 32-bit or big-endian machine"),
        ((12,), b"\xde\xc0\xef\xbe", "of a 32-bit or big-endian machine"),
        ((20,), b"\2", "has LMDB data version 2, not 1"),
        ((40,), b"\1", "is damaged: its pages have 4097 bytes"),
        ((PAGE + 10,), b"\1", "is damaged: page 1 is not a meta page"),
        ((92, PAGE + 92), b"\4", r"is damaged: its key order is custom \(flags 0x4\)"),
        ((PAGE + 94,), b"\x63", "is damaged: its tree has 99 levels"),
    ],
)
def test_damaged_meta_pages_are_named(packed, starts, content, sentence):
    path = packed / "pairs" / "data.mdb"
    changed = bytearray(path.read_bytes())
    for start in starts:
        changed[start : start + len(content)] = content
    path.write_bytes(changed)
    with pytest.raises(DataError, match=sentence):
        open_source(f"lmdb:{packed}")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"is not an LMDB \(0 bytes, its start is empty\); copy or write it again"),
        (b"nothing of the kind", r"is not an LMDB \(19 bytes, its start is 6e6f7468"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer; .*git lfs pull"),
    ],
)
def test_a_file_that_is_not_lmdb_is_reported(packed, content, sentence):
    (packed / "pairs" / "data.mdb").write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        open_source(f"lmdb:{packed}")


def test_no_file_and_a_folder_for_a_file_are_named(packed):
    shutil.rmtree(packed / "imgs")
    with pytest.raises(DataError, match=r"no LMDB at .*imgs; expected imgs and pairs"):
        open_source(f"lmdb:{packed}")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        LmdbFile(packed / "pairs")


def test_a_tree_that_leads_back_to_itself_ends(tmp_path):
    """Each page of a branch that names itself is one level deeper, and levels are counted."""
    with lmdb.open(str(tmp_path / "db"), map_size=1 << 26, lock=False) as environment:
        with environment.begin(write=True) as transaction:
            for number in range(2000):
                transaction.put(b"%d" % number, bytes(500))
        root = environment.stat()
    path = tmp_path / "db" / "data.mdb"
    content = bytearray(path.read_bytes())
    assert root["depth"] == 3
    (top,) = struct.unpack_from("<Q", content, PAGE + 128)
    count = (struct.unpack_from("<H", content, top * PAGE + 12)[0] - 16) // 2
    for (node,) in struct.iter_unpack("<H", content[top * PAGE + 16 : top * PAGE + 16 + 2 * count]):
        struct.pack_into("<HH", content, top * PAGE + node, top & 0xFFFF, top >> 16)
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"page {top} is not the page that the tree refers to"):
        LmdbFile(path).get(b"5")


def test_free_lists_with_a_shared_large_value_end_quickly(tmp_path):
    """A file of 32 MB, whose hundred lists of unused pages are all one value of that size."""
    lmdb.open(str(tmp_path / "db"), lock=False).close()
    path, large = tmp_path / "db" / "data.mdb", 8192
    with path.open("r+b") as stream:
        for meta in (0, PAGE):
            stream.seek(meta + 46)
            stream.write(struct.pack("<H32xQ", 1, 2))  # depth and root of the tree of unused pages
            stream.seek(meta + 136)
            stream.write(struct.pack("<Q", 1 << 40))  # the last page
        nodes = [PAGE - 24 * (number + 1) for number in range(100)]
        stream.seek(2 * PAGE)
        stream.write(struct.pack("<QHHHH100H", 2, 0, 2, 216, nodes[-1], *nodes))
        for number, node in enumerate(nodes):
            size = large * PAGE - 16
            stream.seek(2 * PAGE + node)
            stream.write(
                struct.pack("<HHHHQQ", size & 0xFFFF, size >> 16, 1, 8, number, 3)  # at page 3
            )
        stream.seek(3 * PAGE)
        stream.write(struct.pack("<QHHI", 3, 0, 4, large))
        stream.truncate((3 + large) * PAGE)
    with pytest.raises(DataError, match="it lists more unused pages than it can hold"):
        LmdbFile(path)


def test_a_file_that_is_cut_off_while_it_is_read_does_not_end_the_process(packed, capsys):
    source = open_source(f"lmdb:{packed}")
    os.truncate(packed / "imgs" / "data.mdb", 3 * PAGE)
    for index in range(4):
        with pytest.raises(DataError, match=r"imgs/data\.mdb is truncated"):
            source.image(index)
    assert run(["data", "check", f"lmdb:{packed}"]) == 1
    said = capsys.readouterr().err
    assert "imgs/data.mdb is truncated" in said and said.count("\n") == 1


def mutated(whole, rng):
    """Return a file with a few bytes changed, most of them where pages state their structure."""
    content = bytearray(whole)
    for _ in range(rng.choice([1, 1, 2, 8])):
        page = rng.randrange(len(content) // PAGE) * PAGE
        at = page + rng.choice([rng.randrange(16), rng.randrange(16, 200), rng.randrange(PAGE)])
        size = rng.choice([1, 1, 2, 4, 8])
        new = rng.choice([b"\0" * size, b"\xff" * size, rng.randbytes(size), b"\1" + bytes(size)])
        content[at : at + len(new)] = new
    if rng.random() < 0.1:  # one page in another's place
        one, other = (rng.randrange(len(content) // PAGE) * PAGE for _ in range(2))
        content[one : one + PAGE] = content[other : other + PAGE]
    return content[: rng.randrange(len(content))] if rng.random() < 0.1 else content


def larger(folder):
    """Write an LMDB whose trees have branches, with small and large values."""
    samples = [
        Sample(jpeg(n % 5), ".jpg", f"{n:04}", [(f"{n}", "只" * (n % 300))]) for n in range(200)
    ]
    folder.mkdir()
    write_lmdb(folder, samples)


def read_mutants(folder, seed, count):
    """Read LMDBs of which one file is mutated; return how many said what is wrong."""
    rng = random.Random(seed)
    whole = {part: (folder / part / "data.mdb").read_bytes() for part in ("imgs", "pairs")}
    named = 0
    for _ in range(count):
        part = rng.choice(["imgs", "pairs"])
        (folder / part / "data.mdb").write_bytes(mutated(whole[part], rng))
        started = time.monotonic()
        try:
            source = open_source(f"lmdb:{folder}")
            source.unmatched()
        except CNClipError as error:
            named += 1
            assert "lmdb" in str(error)
        else:
            indexes = (rng.randrange(len(source)) for _ in range(40))
            named += sum(not readable(source, index) for index in indexes)
        assert time.monotonic() - started < 10
        (folder / part / "data.mdb").write_bytes(whole[part])
    return named


def readable(source, index):
    try:
        read_pair(source, index)
    except CNClipError:
        return False
    return True


def test_no_damage_ends_in_anything_but_a_documented_error(tmp_path):
    larger(tmp_path / "lmdb")
    assert read_mutants(tmp_path / "lmdb", seed=1, count=60) > 30


@pytest.mark.full
def test_no_damage_of_thousands_ends_in_anything_but_a_documented_error(tmp_path):
    larger(tmp_path / "lmdb")
    assert read_mutants(tmp_path / "lmdb", seed=2, count=6000) > 3000


# Pairs


IDS = st.one_of(st.integers(), st.text())


@given(IDS, IDS, st.text(), st.sampled_from([tuple, list]), st.integers(0, 5), st.booleans())
@example(7, 7, "7", tuple, 0, False)
@example("猫", "猫", "猫", list, 0, True)  # the same object thrice: told by the memo
@example(10**400, -1, "\ud83d \n\\u0041\\", tuple, 0, False)
def test_a_pair_equals_that_of_pickle(image_id, text_id, text, kind, protocol, python):
    pair = kind([image_id, text_id, text])
    dump = pickle._dumps if python else pickle.dumps  # the two write different opcodes
    raw = dump(pair, protocol)
    assert list(parse_pickled_pair(raw)) == list(pickle.loads(raw)) == list(pair)
    optimized = pickletools.optimize(raw)
    assert list(parse_pickled_pair(optimized)) == list(pair)


class Called:
    def __reduce__(self):
        return print, ("called",)


def doubling(levels):
    """A tuple of a tuple of a tuple, each twice: of few bytes, and 2 ** levels leaves."""
    nested = ()
    for _ in range(levels):
        nested = (nested, nested)
    return nested


def in_itself():
    found = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (pickle.dumps((1, 2, Called())), r"names builtins\.print; only data is read"),
        (pickle.dumps((1, 2, Called()), 0), r"names __builtin__\.print; only data is read"),
        (pickle.dumps(doubling(60)), "opcode EMPTY_TUPLE"),
        (pickle.dumps((1, 2, doubling(60))), "opcode EMPTY_TUPLE"),
        (pickle.dumps(in_itself()), "holds more than numbers and strings"),
        (b"]" * 1_000_000 + b"a" * 999_999 + b".", "more than 32 opcodes"),
        (b"(" * 1_000_000, "more than 32 opcodes"),
        (b"\x80\x02" + b"]q\x00" + b"h\x00a" * 5 + b".", "holds more than numbers and strings"),
        (pickle.dumps((1, 2)), "opcode TUPLE2"),
        (pickle.dumps((1, 2, 3)), r"holds \(1, 2, 3\); expected \(image id, text id, text\)"),
        (pickle.dumps([1, 2]), r"holds \[1, 2\]; expected"),
        (pickle.dumps("a"), "holds 'a'; expected"),
        (pickle.dumps((1, True, "a")), "opcode NEWTRUE"),
        (pickle.dumps((1, True, "a"), 0), "holds more than numbers and strings"),
        (pickle.dumps((1, 2.0, "a")), "opcode BINFLOAT"),
        (pickle.dumps((1, 2, b"a")), "opcode SHORT_BINBYTES"),
        (pickle.dumps({}), "opcode EMPTY_DICT"),
        (b"(S'\\x'\n.", "opcode STRING"),  # whose escape is none
        (b"P1\n.", "opcode PERSID"),
        (b"I" + b"9" * 5000 + b"\n.", "4300 digits"),
        (b"X\xff\xff\xff\xffa.", "expected 4294967295 bytes"),
        (b"X\1\0\0\0\xff.", "codec can't decode byte"),
        (b"", "ends early"),
        (b"K\1K\2", "ends early"),
        (b"h\0.", "gets 0 from its memo"),
        (b"q\0.", "takes from an empty stack"),
        (b".", "takes from an empty stack"),
        (b"t.", "lacks a mark"),
        (b"a.", "takes from an empty stack"),
        (b"K\1K\2a.", "appends to something other than a list"),
        (b"(.", "holds nothing"),
        (b"\xfe.", r"has the unknown opcode b'\\xfe'"),
    ],
)
def test_a_pickle_that_is_not_a_pair_is_refused(raw, sentence):
    started = time.monotonic()
    with pytest.raises(ValueError, match=sentence):
        parse_pickled_pair(raw)
    assert time.monotonic() - started < 1


def test_no_pickle_ends_in_anything_but_a_value_error():
    rng = random.Random(3)
    seeds = [pickle.dumps(kind(PAIRS[3]), n) for kind in (tuple, list) for n in range(6)]
    for _ in range(3000):
        raw = bytearray(rng.choice(seeds))
        for _ in range(rng.choice([1, 2, 5])):
            at = rng.randrange(len(raw))
            raw[at : at + rng.choice([0, 1, 4])] = rng.randbytes(rng.choice([0, 1, 4]))
        try:
            image_id, text_id, text = parse_pickled_pair(bytes(raw))
        except ValueError:
            continue
        assert {type(image_id), type(text_id)} <= {int, str} and type(text) is str


# Counts, keys and base64


@pytest.mark.parametrize(
    ("count", "sentence"),
    [
        (b"1" + b"0" * 17, r"num_samples is 100,000,000,000,000,000, more than a file of [\d,]+ b"),
        (b"1" + b"0" * 18, "expected a count"),
        (b"-1", "num_samples is b'-1'; expected a count"),
        (b"", "num_samples is b''; expected a count"),
        (b"4.0", "num_samples is b'4.0'; expected a count"),
        ("四".encode(), "expected a count"),
        (b"9" * 5000, "expected a count"),
        (b"0", "holds no pair"),
    ],
)
def test_a_count_that_cannot_be_is_named_before_memory_is_taken(packed, count, sentence):
    put(packed / "pairs", [("num_samples", count)])
    with pytest.raises(DataError, match=sentence):
        open_source(f"lmdb:{packed}")


def test_check_reports_an_invalid_image_count(packed):
    put(packed / "imgs", [("num_images", b"many")])
    assert open_source(f"lmdb:{packed}").unmatched() == [
        f"{packed}/imgs: num_images is b'many'; expected a count"
    ]


def test_missing_counts_keys_and_images_are_named(packed):
    put(packed / "pairs", [("1", pickle.dumps(("nowhere", 1, "猫"))), ("2", pickle.dumps((1, 2)))])
    put(packed / "imgs", [("007", b"=not base64="), ("008", base64.b64encode(b"abcd")[:-1])])
    source = open_source(f"lmdb:{packed}")
    for index, sentence in (
        (0, "pairs, key 0: its image is not base64"),
        (1, r"pairs, key 1: no key 'nowhere' in .*/imgs"),
        (2, "pairs, key 2 is not a pair: its pickle has the opcode TUPLE2"),
        (7, "pairs, key 7: no key '7' in .*/pairs"),
    ):
        with pytest.raises(DataError, match=sentence):
            source.image(index)
    with (
        lmdb.open(str(packed / "pairs"), map_size=1 << 24) as environment,
        environment.begin(write=True) as transaction,
    ):
        transaction.delete(b"num_samples")
    with pytest.raises(DataError, match=r"no key 'num_samples' in .*/pairs"):
        open_source(f"lmdb:{packed}")


def test_an_id_of_thousands_of_digits_is_read(tmp_path):
    write_lmdb(tmp_path, [Sample(jpeg(1), ".jpg", "7", [("9" * 5000, "猫"), ("9" * 255, "狗")])])
    source = open_source(f"lmdb:{tmp_path}")
    assert [source.row(n).text_id for n in (0, 1)] == ["9" * 5000, "9" * 255]


def test_ids_that_lmdb_has_no_key_for_are_named_before_they_are_lost(tmp_path):
    for image_id, sentence in (
        ("猫" * 200, "has 600 bytes; an LMDB key has 1 to 511: write tar or tsv instead"),
        ("num_images", "the image id num_images is reserved in an LMDB"),
    ):
        folder = tmp_path / image_id[:3]
        folder.mkdir()
        with pytest.raises(DataError, match=sentence):
            write_lmdb(folder, [Sample(jpeg(1), ".jpg", image_id, [("1", "猫")])])
