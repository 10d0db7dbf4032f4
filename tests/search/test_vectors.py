"""Vector search: the oracle is a stable sort of float64 products."""

import dataclasses
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from cn_clip.errors import CNClipError, UsageError
from cn_clip.search import ann, exact
from cn_clip.search import vectors as picker
from cn_clip.search.ann import ABOUT, FILE, AnnIndex
from cn_clip.search.codes import Codes, encode
from cn_clip.search.exact import search_exact
from cn_clip.search.kernels import float32_of
from cn_clip.search.vectors import prepare, search_vectors

ROWS, DIM = 6000, 48


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def draw(count, dim=DIM, seed=0):
    """Return clustered unit vectors, float16, as embeddings are."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(40, dim))
    rows = centers[rng.integers(40, size=count)] + rng.normal(size=(count, dim))
    return unit(rows + 1).astype(np.float16)  # + 1: all point to one side


def draw_queries(count, dim=DIM, seed=1):
    """Return queries about another mean than the vectors."""
    return unit(draw(count, dim, seed).astype(np.float32) - 0.1).astype(np.float32)


def oracle(vectors, queries, k, allowed=None):
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    possible = vectors.any(axis=1) if allowed is None else vectors.any(axis=1) & allowed
    scores[:, ~possible] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, : min(k, possible.sum())]
    return order, np.take_along_axis(scores, order, axis=1)


def agrees(found, expected):
    indexes, scores = expected
    assert found.indexes.dtype == np.int64 and found.scores.dtype == np.float32
    np.testing.assert_allclose(found.scores, scores, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found.indexes, indexes)


def recall(found, expected):
    pairs = zip(found.indexes, expected[0], strict=True)
    return np.mean([np.isin(best, rows).mean() for rows, best in pairs])


@pytest.fixture(scope="module")
def gallery():
    vectors = draw(ROWS)
    vectors[[0, 17, 4000]] = 0
    vectors[3000] = vectors[12]
    vectors[12] = vectors[3000]
    return vectors


@pytest.fixture(params=["numkong", "numpy"])
def kernels(request, monkeypatch):
    if request.param == "numpy":
        for module in ("kernels", "exact"):
            monkeypatch.setattr(f"cn_clip.search.{module}.has_numkong", lambda: False)
    else:
        pytest.importorskip("numkong")


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks and threads for few rows."""
    monkeypatch.setattr(exact, "_BLOCK_BYTES", 2 * DIM * 700)
    monkeypatch.setattr(exact, "_INLINE_BYTES", 0)


@pytest.fixture(scope="module")
def faiss():
    if ann.load_faiss() is None:
        pytest.skip("needs faiss, on Linux")


@pytest.fixture(scope="module")
def built(gallery, tmp_path_factory, faiss):
    """An index of all but the last 500 rows."""
    folder = tmp_path_factory.mktemp("ann")
    AnnIndex.build(gallery[:-500], folder, draw_queries(100, seed=5))
    return folder


@pytest.mark.parametrize("count", [1, 3, 300])
@pytest.mark.parametrize("k", [1, 10, 200])
def test_exact_search_is_a_stable_sort_of_float64_products(
    gallery, kernels, small_blocks, count, k
):
    queries = draw_queries(count)
    for threads in (1, 3):
        agrees(search_exact(gallery, queries, k, threads=threads), oracle(gallery, queries, k))


@pytest.mark.parametrize("share", [0.5, 0.01, 0.001, 0])
@pytest.mark.parametrize("coded", [False, True])
def test_filters_are_exact_at_every_selectivity(
    gallery, kernels, small_blocks, tmp_path, share, coded
):
    allowed = np.random.default_rng(3).random(ROWS) < share
    codes = Codes.update(tmp_path, gallery) if coded else None
    for count in (1, 5):
        queries = draw_queries(count)
        found = search_exact(gallery, queries, 10, allowed=allowed, codes=codes)
        agrees(found, oracle(gallery, queries, 10, allowed))


def test_a_larger_k_than_allowed_rows_returns_them_all(gallery, kernels):
    allowed = np.zeros(ROWS, bool)
    allowed[[0, 5, 17, 900]] = True  # 0 and 17 are zeros
    found = search_exact(gallery, draw_queries(2), 10, allowed=allowed)
    assert found.indexes.shape == (2, 2) and set(found.indexes.ravel()) == {5, 900}
    assert search_exact(gallery[:0], draw_queries(2), 10).indexes.shape == (2, 0)
    assert search_exact(gallery, draw_queries(0), 10).indexes.shape == (0, 10)
    assert search_exact(gallery, draw_queries(1), 2 * ROWS).indexes.shape == (1, ROWS - 3)


def test_equal_rows_rank_by_row(kernels, small_blocks, tmp_path):
    vectors = np.repeat(draw(30), 100, axis=0)[np.random.default_rng(0).permutation(3000)]
    queries = draw_queries(4)
    for codes in (None, Codes.update(tmp_path, vectors)):
        agrees(search_exact(vectors, queries, 150, codes=codes), oracle(vectors, queries, 150))


@pytest.mark.parametrize("coded", [False, True])
def test_rows_of_zeros_never_win_over_negative_cosines(kernels, tmp_path, coded):
    vectors = draw(500)
    queries = -unit(vectors[1:4].astype(np.float32) + 5)
    vectors[::2] = 0
    assert (queries @ vectors[1::2].T < 0).all()
    codes = Codes.update(tmp_path, vectors) if coded else None
    found = search_exact(vectors, queries, 300, codes=codes)
    agrees(found, oracle(vectors, queries, 300))
    assert found.indexes.shape == (3, 250)


def test_rows_that_are_not_finite_are_not_returned(gallery, kernels, tmp_path):
    vectors = gallery.copy()
    vectors[20, 3], vectors[21, 4] = np.inf, np.nan
    expected = vectors.copy()
    expected[20:22] = 0
    queries = draw_queries(3)
    for codes in (None, Codes.update(tmp_path, vectors)):
        agrees(search_exact(vectors, queries, 10, codes=codes), oracle(expected, queries, 10))


def test_rows_that_were_purged_after_they_were_coded_hide_no_others(
    gallery, kernels, tmp_path, faiss
):
    queries = draw_queries(3)
    codes = Codes.update(tmp_path, gallery)
    AnnIndex.build(gallery, tmp_path, draw_queries(30, seed=5))
    vectors = gallery.copy()
    vectors[oracle(gallery, queries, 200)[0]] = 0
    expected = oracle(vectors, queries, 10)
    agrees(search_exact(vectors, queries, 10, codes=codes), expected)
    index = AnnIndex.open(tmp_path, gallery)
    agrees(dataclasses.replace(index, vectors=vectors).search(queries, 10), expected)


def test_a_memory_map_is_searched_like_an_array(gallery, tmp_path):
    gallery.tofile(tmp_path / "vectors.f16")
    mapped = np.memmap(tmp_path / "vectors.f16", np.float16, "r", shape=gallery.shape)
    agrees(search_exact(mapped, draw_queries(2), 5), oracle(gallery, draw_queries(2), 5))


def test_threads_may_search_at_once(gallery, small_blocks, built):
    expected = {seed: oracle(gallery, draw_queries(3, seed=seed), 10) for seed in range(8)}
    wrong = []

    def search(seed):
        found = search_exact(gallery, draw_queries(3, seed=seed), 10, threads=2)
        wrong.append(not np.array_equal(found.indexes, expected[seed][0]))

    threads = [threading.Thread(target=search, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [False] * 8


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (draw_queries(1, 32), 10, "dimension 32 and 48"),
        (draw_queries(1), 0, "k = 0"),
        (np.full((1, DIM), np.nan), 10, "NaN"),
        (draw_queries(1)[0], 10, "shape"),
    ],
)
def test_what_cannot_be_searched_is_a_usage_error(gallery, built, queries, k, message):
    index = AnnIndex.open(built, gallery)
    for search in (lambda: search_exact(gallery, queries, k), lambda: index.search(queries, k)):
        with pytest.raises(UsageError, match=message):
            search()


def test_every_float16_number_becomes_the_same_float32_number():
    numbers = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = numbers[np.isfinite(numbers)]
    np.testing.assert_array_equal(
        float32_of(finite).view(np.uint32), finite.astype(np.float32).view(np.uint32)
    )


def test_codes_are_within_half_a_step_of_the_vectors(gallery):
    codes, scales = encode(gallery)
    error = np.abs(codes * scales[:, None] - gallery.astype(np.float64))
    assert (error <= 0.5001 * scales[:, None]).all() and np.abs(codes).max() == 127
    assert not codes[17].any() and scales[17] == 0


def test_a_search_by_codes_is_exact_but_for_rare_rows(gallery, small_blocks, tmp_path):
    pytest.importorskip("numkong")
    queries = draw_queries(200)
    found = search_exact(gallery, queries, 10, codes=Codes.update(tmp_path, gallery))
    expected = oracle(gallery, queries, 10)
    assert recall(found, expected) >= 0.999
    np.testing.assert_allclose(found.scores, expected[1], rtol=0, atol=1e-4)


def test_codes_are_extended_by_appended_rows_and_cover_the_first_rows_until_then(
    gallery, small_blocks, tmp_path
):
    codes = Codes.update(tmp_path, gallery[:4000])
    before = (tmp_path / "codes.i8").stat()
    assert codes.rows == 4000
    opened = Codes.open(tmp_path, gallery)
    agrees(
        search_exact(gallery, draw_queries(3), 10, codes=opened),
        oracle(gallery, draw_queries(3), 10),
    )
    extended = Codes.update(tmp_path, gallery)
    after = (tmp_path / "codes.i8").stat()
    assert extended.rows == ROWS and after.st_ino == before.st_ino
    np.testing.assert_array_equal(extended.codes, encode(gallery)[0])
    assert codes.rows == 4000  # a reader's map stays
    assert Codes.open(tmp_path, gallery[:4000]) is None  # fewer vectors: another file


@pytest.mark.parametrize("damage", ["cut", "other vectors", "not JSON", "wrong rows", "missing"])
def test_damaged_codes_are_not_used_and_are_made_again(gallery, tmp_path, damage):
    Codes.update(tmp_path, gallery)
    about = tmp_path / "codes.json"
    vectors = gallery
    if damage == "cut":
        os.truncate(tmp_path / "codes.i8", 1000)
    elif damage == "other vectors":
        vectors = draw(ROWS, seed=4)
    elif damage == "not JSON":
        about.write_bytes(b"\xff{[")
    elif damage == "wrong rows":
        about.write_text(json.dumps(json.loads(about.read_text()) | {"rows": "6000"}))
    else:
        (tmp_path / "scales.f32").unlink()
    assert Codes.open(tmp_path, vectors) is None
    np.testing.assert_array_equal(Codes.update(tmp_path, vectors).codes, encode(vectors)[0])


def test_the_index_finds_what_it_was_tuned_for_and_appended_rows_exactly(gallery, built, kernels):
    index = AnnIndex.open(built, gallery)
    assert index.rows == ROWS - 500 and not index.is_outgrown
    assert index.probes < index.lists
    queries = draw_queries(200, seed=8)
    expected = oracle(gallery, queries, 10)
    found = index.search(queries, 10)
    assert recall(found, expected) >= 0.97
    newest = expected[0] >= ROWS - 500
    assert newest.sum() > 50
    assert np.isin(expected[0][newest], found.indexes[newest.any(axis=1)]).all()
    exact_scores = (queries[:, None] * gallery[found.indexes].astype(np.float64)).sum(axis=2)
    np.testing.assert_allclose(found.scores, exact_scores, rtol=0, atol=1e-6)
    one = index.search(queries[:1], 10)
    np.testing.assert_array_equal(one.indexes, found.indexes[:1])


@pytest.mark.parametrize("share", [0.5, 0.01, 0.0005])
def test_the_index_returns_only_allowed_rows(gallery, built, share):
    allowed = np.random.default_rng(3).random(ROWS) < share
    queries = draw_queries(100, seed=8)
    found = AnnIndex.open(built, gallery).search(queries, 10, allowed=allowed)
    assert allowed[found.indexes].all()
    expected = oracle(gallery, queries, 10, allowed)
    assert found.indexes.shape == expected[0].shape
    assert recall(found, expected) >= (0.97 if share == 0.5 else 1)


def test_the_index_finds_rows_far_from_a_query_that_a_filter_leaves(built, gallery):
    queries = draw_queries(20, seed=8)
    scores = queries.mean(axis=0) @ gallery.T.astype(np.float32)
    allowed = scores < np.median(scores)
    found = AnnIndex.open(built, gallery).search(queries, 10, allowed=allowed)
    assert found.indexes.shape == (20, 10)
    assert recall(found, oracle(gallery, queries, 10, allowed)) >= 0.9


def test_a_few_hidden_rows_cost_no_further_cells(built, gallery):
    index = AnnIndex.open(built, gallery)
    searches = []

    class Counted:
        quantizer = index.index.quantizer

        def search(self, queries, k, params):
            searches.append(params.nprobe)
            return index.index.search(queries, k, params=params)

    counted = dataclasses.replace(index, index=Counted())
    queries = draw_queries(200, seed=8)
    allowed = np.random.default_rng(3).random(ROWS) < 0.98
    found = counted.search(queries, 10, allowed=allowed)
    assert searches == [index.probes]
    assert allowed[found.indexes].all()
    assert recall(found, oracle(gallery, queries, 10, allowed)) >= 0.97
    near = oracle(gallery, queries[:1], 40)[0][0]  # what is near to one query is hidden
    allowed[near] = False
    found = counted.search(queries, 10, allowed=allowed)
    assert len(searches) > 2 and allowed[found.indexes].all()
    assert recall(found, oracle(gallery, queries, 10, allowed)) >= 0.97


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_the_index_finds_what_is_left_when_a_filter_excludes_all_that_is_near(
    built, gallery, share
):
    index = AnnIndex.open(built, gallery)
    reached = []
    for query in draw_queries(20, seed=8):
        scores = gallery.astype(np.float32) @ query
        allowed = scores < np.quantile(scores, share)
        found = index.search(query[None], 10, allowed=allowed)
        assert allowed[found.indexes].all()
        reached.append(recall(found, oracle(gallery, query[None], 10, allowed)))
    assert np.mean(reached) >= 0.8


def test_an_index_of_few_or_equal_rows_is_searched_too(tmp_path, faiss):
    for vectors in (draw(1), np.repeat(draw(1), 300, axis=0), draw(50)):
        index = AnnIndex.build(vectors, tmp_path, draw_queries(3))
        agrees(index.search(draw_queries(2), 5), oracle(vectors, draw_queries(2), 5))
    for vectors in (draw(0), np.zeros((5, DIM), np.float16)):
        with pytest.raises(UsageError, match="needs vectors"):
            AnnIndex.build(vectors, tmp_path, draw_queries(3))


@pytest.mark.parametrize("at", [0, 30, 4096, 30_000, 80_000, -70_000, "cut", "empty", "other"])
def test_a_damaged_or_foreign_index_is_not_used(gallery, built, tmp_path, at):
    raw = bytearray((built / FILE).read_bytes())
    vectors = gallery
    (tmp_path / ABOUT).write_bytes((built / ABOUT).read_bytes())
    (tmp_path / FILE).write_bytes(raw)
    assert AnnIndex.open(tmp_path, gallery) is not None
    if at == "cut":
        raw = raw[:-100]
    elif at == "empty":
        raw = b""
    elif at == "other":
        vectors = draw(ROWS, seed=4)
    else:
        raw[at : at + 60_000] = bytes(byte ^ 0x55 for byte in raw[at : at + 60_000])
    (tmp_path / FILE).write_bytes(raw)
    assert AnnIndex.open(tmp_path, vectors) is None
    assert AnnIndex.open(built, gallery[:1000]) is None


def test_an_index_is_only_used_with_its_own_description(gallery, built, tmp_path):
    about = json.loads((built / ABOUT).read_text())

    def opened(text):
        (tmp_path / ABOUT).write_text(text)
        return AnnIndex.open(tmp_path, gallery)

    (tmp_path / FILE).write_bytes((built / FILE).read_bytes())
    assert opened(json.dumps(about)) is not None
    for text in ("", "[]", "[" * 100_000, json.dumps(about)[:-1]):
        assert opened(text) is None
    for name in ("probes", "rows", "lists", "members", "dim"):
        for value in (0, -1, 1 << 40, "1", None, 1.0, True):
            assert opened(json.dumps(about | {name: value})) is None
    for name in ("format", "faiss", "vectors", "index"):
        assert opened(json.dumps(about | {name: "other"})) is None
    AnnIndex.build(gallery[:4000], tmp_path, draw_queries(3))  # an index newer than a description
    assert opened(json.dumps(about)) is None


def test_wrong_rows_in_an_index_are_not_returned_even_if_its_checksum_is_right(
    gallery, built, tmp_path
):
    queries = draw_queries(20, seed=8)
    expected = AnnIndex.open(built, gallery[:-500]).search(queries, 10)
    first = np.unique(expected.indexes[:, 0])
    raw = (built / FILE).read_bytes()
    for row, wrong in zip(first, (-2, ROWS - 400, ROWS, 1 << 40, -(1 << 63)), strict=False):
        ids = [int(number).to_bytes(8, "little", signed=True) for number in (row, wrong)]
        assert ids[0] in raw
        raw = raw.replace(*ids)
    (tmp_path / FILE).write_bytes(raw)
    about = json.loads((built / ABOUT).read_text())
    with (tmp_path / FILE).open("rb") as stream:
        digest = ann._index_digest(stream, about["members"], about["dim"])
    (tmp_path / ABOUT).write_text(json.dumps(about | {"index": digest}))
    index = AnnIndex.open(tmp_path, gallery[:-500])
    for allowed in (None, np.ones(ROWS - 500, bool)):
        found = index.search(queries, 10, allowed=allowed)
        assert ((found.indexes >= 0) & (found.indexes < ROWS - 500)).all()
        assert not np.isin(found.indexes, first[:5]).any()
        scores = (queries[:, None] * gallery[found.indexes].astype(np.float64)).sum(axis=2)
        np.testing.assert_allclose(found.scores, scores, rtol=0, atol=1e-6)


def test_an_index_may_be_in_a_folder_whose_name_is_not_utf_8(gallery, tmp_path, faiss):
    folder = tmp_path / os.fsdecode(b"\xff")
    queries = draw_queries(20, seed=8)
    found = AnnIndex.build(gallery, folder, queries).search(queries, 10)
    assert recall(found, oracle(gallery, queries, 10)) >= 0.97
    assert AnnIndex.open(folder, gallery) is not None


def test_rows_that_are_not_finite_are_not_indexed(gallery, tmp_path, faiss):
    vectors = gallery.copy()
    vectors[20, 3], vectors[21, 4] = np.inf, np.nan
    index = AnnIndex.build(vectors, tmp_path, draw_queries(20, seed=5))
    assert index.index.ntotal == ROWS - 5
    found = index.search(vectors[[22]].astype(np.float32), 10)
    assert found.indexes[0, 0] == 22 and not np.isin(found.indexes, (20, 21)).any()


def test_a_large_library_without_faiss_is_searched_by_codes_and_a_warning_says_so_once(
    gallery, built, tmp_path, monkeypatch
):
    monkeypatch.setattr(picker, "ANN_ROWS", 1000)
    for module in (picker, ann):
        monkeypatch.setattr(module, "load_faiss", lambda: None)
    picker._warn_of_missing_faiss.cache_clear()
    queries = draw_queries(30, seed=8)
    with pytest.warns(UserWarning, match="pip install faiss-cpu"):
        prepare(gallery[:-100], tmp_path, queries)
    prepare(gallery, tmp_path, queries)
    assert Codes.open(tmp_path, gallery).rows == ROWS and not (tmp_path / FILE).exists()
    found = search_vectors(gallery, queries, 10, cache=tmp_path)
    assert recall(found, oracle(gallery, queries, 10)) >= 0.99
    assert AnnIndex.open(built, gallery) is None
    with pytest.raises(UsageError, match="pip install faiss-cpu"):
        AnnIndex.build(gallery, tmp_path, queries)


def test_a_small_library_never_imports_faiss(gallery, tmp_path, monkeypatch):
    monkeypatch.setattr(picker, "load_faiss", lambda: pytest.fail("imported"))
    monkeypatch.setattr(ann, "load_faiss", lambda: pytest.fail("imported"))
    prepare(gallery, tmp_path, draw_queries(1))
    search_vectors(gallery, draw_queries(1), 10, cache=tmp_path)
    code = "import cn_clip.search.library, sys; sys.exit('faiss' in sys.modules)"
    assert not subprocess.run([sys.executable, "-c", code]).returncode


def test_faiss_is_not_loaded_where_it_may_end_the_process(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert ann.load_faiss.__wrapped__() is None


def test_small_galleries_are_searched_exactly_and_large_ones_by_the_index(
    gallery, tmp_path, monkeypatch, faiss
):
    queries = draw_queries(30, seed=8)
    expected = oracle(gallery, queries, 10)
    agrees(search_vectors(gallery, queries, 10), expected)
    agrees(search_vectors(gallery, queries, 10, cache=tmp_path / "missing"), expected)
    prepare(gallery, tmp_path, queries)
    assert Codes.open(tmp_path, gallery) and not (tmp_path / FILE).exists()
    assert recall(search_vectors(gallery, queries, 10, cache=tmp_path), expected) >= 0.99

    monkeypatch.setattr(picker, "ANN_ROWS", 1000)
    prepare(gallery[:4000], tmp_path, queries)
    prepare(gallery[:4100], tmp_path, queries)
    assert AnnIndex.open(tmp_path, gallery).rows == 4000  # 100 rows more do not pay
    found = search_vectors(gallery, queries, 10, cache=tmp_path)
    assert recall(found, expected) >= 0.97
    prepare(gallery, tmp_path, queries)
    assert AnnIndex.open(tmp_path, gallery).rows == ROWS
    (tmp_path / FILE).write_bytes(b"damaged")
    assert recall(search_vectors(gallery, queries, 10, cache=tmp_path), expected) >= 0.99
    for path in tmp_path.iterdir():
        path.unlink()
    agrees(search_vectors(gallery, queries, 10, cache=tmp_path), expected)


def test_caches_stay_open_until_a_file_changes(gallery, tmp_path, monkeypatch):
    opened = []
    original = Codes.open
    monkeypatch.setattr(
        Codes, "open", lambda *args: (opened.append(args), original(*args))[1], raising=True
    )
    gallery.tofile(tmp_path / "vectors.f16")
    prepare(gallery, tmp_path, draw_queries(1))
    del opened[:]
    for _unused in range(3):  # a new map each time
        vectors = np.memmap(tmp_path / "vectors.f16", np.float16, "r", shape=gallery.shape)
        search_vectors(vectors, draw_queries(1), 10, cache=tmp_path)
    assert len(opened) == 1
    draw(ROWS, seed=4).tofile(tmp_path / "vectors.f16")
    vectors = np.memmap(tmp_path / "vectors.f16", np.float16, "r", shape=gallery.shape)
    found = search_vectors(vectors, draw_queries(1), 10, cache=tmp_path)
    agrees(found, oracle(vectors, draw_queries(1), 10))
    assert len(opened) == 2


def test_an_index_is_replaced_while_others_search_it(gallery, tmp_path, monkeypatch, faiss):
    monkeypatch.setattr(picker, "ANN_ROWS", 1000)
    queries = draw_queries(5, seed=8)
    prepare(gallery, tmp_path, queries)
    old = AnnIndex.open(tmp_path, gallery)
    before = old.search(queries, 10)
    builder = threading.Thread(target=AnnIndex.build, args=(gallery, tmp_path, queries))
    builder.start()
    while builder.is_alive():
        assert search_vectors(gallery, queries, 10, cache=tmp_path).indexes.shape == (5, 10)
    builder.join()
    np.testing.assert_array_equal(old.search(queries, 10).indexes, before.indexes)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable_is_reported(gallery, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CNClipError, match="could not write"):
        Codes.update(tmp_path, gallery)


def test_a_file_in_the_place_of_the_folder_is_reported(gallery, tmp_path, faiss):
    (tmp_path / "cache").write_text("")
    with pytest.raises(CNClipError, match="could not write"):
        Codes.update(tmp_path / "cache", gallery)
    with pytest.raises(CNClipError, match="could not write"):
        AnnIndex.build(gallery, tmp_path / "cache", draw_queries(3))
    agrees(
        search_vectors(gallery, draw_queries(3), 10, cache=tmp_path / "cache"),
        oracle(gallery, draw_queries(3), 10),
    )
