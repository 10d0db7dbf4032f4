"""``embed``: every input and output, broken off and taken up, and what is wrong with the input."""

import base64
import json

import numpy as np
import pytest
from conftest import TINY, make_image, make_model
from filelock import FileLock

import cn_clip
from cn_clip import weights
from cn_clip.cli import run
from cn_clip.embeddings import extract as module
from cn_clip.embeddings.extract import extract
from cn_clip.embeddings.inputs import read_images, read_texts
from cn_clip.errors import CNClipError, UsageError


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    weights.save_folder(make_model(TINY["vit"]), path)
    return cn_clip.load(path, device="cpu")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(8):
        make_image(index).save(folder / f"{index}.png")
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "_PER_PART", {"images": 3, "texts": 3})


def vectors(path):
    with np.load(path) as stored:
        return stored["embeddings"], stored["ids"], json.loads(str(stored["about"]))


def test_an_npz_holds_the_vectors_of_embed_images(embedder, pictures, tmp_path):
    done = extract(embedder, "images", read_images([str(pictures)]), tmp_path / "x.npz")
    rows, ids, about = vectors(tmp_path / "x.npz")
    paths = sorted(pictures.iterdir())
    np.testing.assert_allclose(rows, embedder.embed_images(paths), atol=1e-6)
    assert ids.tolist() == [str(path) for path in paths]
    assert about["normalized"] is True
    assert about["fingerprint"] == embedder.fingerprint
    assert (done.written, done.embedded, done.resumed, done.failed) == (8, 8, 0, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "x.npz"]


def test_the_official_jsonl_and_clip_retrievals_folder_hold_the_same(embedder, pictures, tmp_path):
    from pyarrow import parquet

    extract(embedder, "images", read_images([str(pictures)]), tmp_path / "x.npz")
    extract(embedder, "images", read_images([str(pictures)]), tmp_path / "x.jsonl")
    extract(embedder, "images", read_images([str(pictures)]), tmp_path / "folder")
    expected, ids, about = vectors(tmp_path / "x.npz")
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [line["image_id"] for line in lines] == ids.tolist()
    np.testing.assert_allclose([line["feature"] for line in lines], expected, atol=1e-7)
    np.testing.assert_array_equal(np.load(tmp_path / "folder/img_emb/img_emb_0.npy"), expected)
    table = parquet.read_table(tmp_path / "folder/metadata/metadata_0.parquet")
    assert table["image_path"].to_pylist() == ids.tolist()
    for stated in ("x.jsonl.about.json", "folder/about.json"):
        assert json.loads((tmp_path / stated).read_text()) == about


def test_every_input_of_images_gives_the_same_rows(embedder, pictures, tmp_path):
    paths = sorted(pictures.iterdir())
    (pictures / "list.txt").write_text("\n".join(path.name for path in paths))
    lines = [json.dumps({"image": p.name, "image_id": i}) for i, p in enumerate(paths)]
    (pictures / "list.jsonl").write_text("\n".join(lines))
    encoded = [base64.b64encode(p.read_bytes()).decode() for p in paths]
    rows = [f"{10 + i}\t{each}" for i, each in enumerate(encoded)]
    (pictures / "imgs.tsv").write_text("\n".join(rows) + "\n")
    expected = embedder.embed_images(paths)
    found = {}
    for given in ("", "*.png", "list.txt", "list.jsonl", "imgs.tsv"):
        out = tmp_path / f"{len(found)}.npz"
        extract(embedder, "images", read_images([str(pictures / given)]), out)
        rows, found[given], _ = vectors(out)
        np.testing.assert_allclose(rows, expected, atol=1e-6)
    assert found["list.jsonl"].tolist() == list(range(8))
    assert found["imgs.tsv"].tolist() == list(range(10, 18))
    assert found["list.txt"].tolist() == [path.name for path in paths]


def test_texts_come_from_lines_and_from_the_official_jsonl(embedder, tmp_path):
    texts = ["一只猫", "两只狗", "火箭", "杯子里的咖啡"]
    (tmp_path / "t.txt").write_text("\n".join(texts) + "\n\n", encoding="utf-8")
    lines = [{"text_id": 5 + i, "text": t, "image_ids": []} for i, t in enumerate(texts)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name, ids in (("t.txt", [1, 2, 3, 4]), ("t.jsonl", [5, 6, 7, 8])):
        out = tmp_path / f"{name}.features.jsonl"
        extract(embedder, "texts", read_texts([str(tmp_path / name)]), out)
        written = [json.loads(line) for line in out.read_text().splitlines()]
        assert [line["text_id"] for line in written] == ids
        rows = [line["feature"] for line in written]
        np.testing.assert_allclose(rows, embedder.embed_texts(texts), atol=1e-6)


def test_an_interrupted_run_resumes_where_it_stopped(embedder, pictures, tmp_path):
    def stop(done, _):
        if done == 7:
            raise KeyboardInterrupt

    out = tmp_path / "x.npz"
    with pytest.raises(KeyboardInterrupt):
        extract(embedder, "images", read_images([str(pictures)]), out, on_progress=stop)
    assert not out.exists()
    make_image(99).save(pictures / "1.png")  # changed since
    make_image(98).save(pictures / "0a.png")  # new, between old ones
    done = extract(embedder, "images", read_images([str(pictures)]), out)
    assert (done.resumed, done.embedded, done.written) == (5, 4, 9)
    rows, ids, _ = vectors(out)
    assert ids.tolist() == [str(path) for path in sorted(pictures.iterdir())]
    np.testing.assert_allclose(rows, embedder.embed_images(ids.tolist()), atol=1e-6)
    assert not (tmp_path / "x.npz.parts").exists()


def test_parts_of_another_model_are_not_mixed_in(embedder, pictures, tmp_path):
    def stop(done, _):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(
            embedder, "images", read_images([str(pictures)]), tmp_path / "x.npz", on_progress=stop
        )
    weights.save_folder(make_model(TINY["vit"], seed=5), tmp_path / "other")
    other = cn_clip.load(tmp_path / "other", device="cpu")
    with pytest.raises(UsageError, match="started with another model"):
        extract(other, "images", read_images([str(pictures)]), tmp_path / "x.npz")
    done = extract(
        other, "images", read_images([str(pictures)]), tmp_path / "x.npz", overwrite=True
    )
    assert (done.resumed, done.written) == (0, 8)


def test_unreadable_images_are_counted_listed_and_skipped(embedder, pictures, tmp_path, capsys):
    (pictures / "3.png").write_bytes(b"no picture")
    (pictures / "list.txt").write_text("0.png\n3.png\nnone.png\n7.png\n")
    done = extract(
        embedder, "images", read_images([str(pictures / "list.txt")]), tmp_path / "x.npz"
    )
    assert [name for name, _ in done.failed] == ["3.png", "none.png"]
    assert "no such file" in done.failed[1][1]
    rows, ids, _ = vectors(tmp_path / "x.npz")
    assert ids.tolist() == ["0.png", "7.png"]
    expected = embedder.embed_images([pictures / "0.png", pictures / "7.png"])
    np.testing.assert_allclose(rows, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"image": "0.png"}\n{oops', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", "[1]", r"a\.jsonl, line 1 is not a JSON object"),
        ("a.jsonl", '{"picture": "0.png"}', r"a\.jsonl, line 1: expected"),
        ("a.jsonl", '{"image": "0.png", "image_id": null}', "line 1: image_id is None"),
        ("a.tsv", "1\tQUJD\n2 QUJD", r"a\.tsv, line 2: expected an id, a tab and base64"),
        ("a.txt", "0.png\n1.png\n0.png", r"line 3: the id '0\.png' was used before, .*line 1"),
        ("a.txt", "", "hold no images"),
        ("a.doc", "x", "neither an image nor a list of images"),
    ],
)
def test_an_invalid_list_is_reported_with_its_line(
    embedder, pictures, tmp_path, name, content, message
):
    (pictures / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        extract(embedder, "images", read_images([str(pictures / name)]), tmp_path / "x.npz")
    assert not (tmp_path / "x.npz").exists()


def test_a_tsv_row_without_base64_is_counted_with_its_line(embedder, pictures, tmp_path):
    encoded = base64.b64encode((pictures / "0.png").read_bytes()).decode()
    (tmp_path / "a.tsv").write_text(f"1\t{encoded}\n2\t\n3\tno!base64\n")
    done = extract(embedder, "images", read_images([str(tmp_path / "a.tsv")]), tmp_path / "x.jsonl")
    assert [name for name, _ in done.failed] == [2, 3]
    assert "a.tsv, line 2: " in done.failed[0][1]
    assert done.written == 1


def test_an_existing_output_and_an_unknown_format_are_refused(embedder, pictures, tmp_path):
    (tmp_path / "x.npz").write_text("mine")
    with pytest.raises(UsageError, match="exists; give another place, or --overwrite"):
        extract(embedder, "images", read_images([str(pictures)]), tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_text() == "mine"
    with pytest.raises(UsageError, match=r"give \.npz, \.jsonl"):
        extract(embedder, "images", read_images([str(pictures)]), tmp_path / "x.csv")


def test_a_second_process_is_asked_to_wait(embedder, pictures, tmp_path):
    (tmp_path / "x.npz.parts").mkdir()
    with (
        FileLock(tmp_path / "x.npz.parts" / ".lock"),
        pytest.raises(CNClipError, match="another process is writing"),
    ):
        extract(embedder, "images", read_images([str(pictures)]), tmp_path / "x.npz")


def test_a_full_disk_keeps_the_finished_parts(embedder, pictures, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(CNClipError, match=r"finished parts stay in .*x\.npz\.parts"):
            extract(embedder, "images", read_images([str(pictures)]), tmp_path / "x.npz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "x.npz").exists()
    done = extract(embedder, "images", read_images([str(pictures)]), tmp_path / "x.npz")
    assert done.written == 8
    assert done.resumed > 0


def test_the_command_line(pictures, tmp_path, capsys):
    (pictures / "bad.png").write_bytes(b"")
    out = str(tmp_path / "x.npz")
    assert run(["embed", "images", str(pictures), "--out", out, "--json"]) == 1
    caught = capsys.readouterr()
    told = json.loads(caught.out)
    assert (told["written"], len(told["failed"]), told["normalized"]) == (8, 1, True)
    assert "bad.png" in caught.err
    assert run(["embed", "images", str(pictures), "--out", out]) == 2
    assert run(["embed", "images", "--out", out]) == 2
    assert run(["embed", "texts", str(tmp_path / "no.txt"), "--out", out]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_damaged_part_is_embedded_again(embedder, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PER_PART", {"images": 4, "texts": 4})
    whole, out = tmp_path / "whole.npz", tmp_path / "out.npz"
    items = [*read_images([str(pictures)])]
    extract(embedder, "images", items, whole)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "writer_for", lambda _: interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(embedder, "images", items, out)
    parts = sorted(out.with_name("out.npz.parts").glob("*.npz"))
    assert len(parts) > 1
    parts[0].write_bytes(parts[0].read_bytes()[:100])
    monkeypatch.undo()
    with pytest.warns(UserWarning, match=r"000000\.npz .*embedded again"):
        report = extract(embedder, "images", items, out)
    assert report.embedded == 4
    one, other = np.load(whole), np.load(out)
    np.testing.assert_allclose(one["embeddings"], other["embeddings"], atol=1e-6)
    np.testing.assert_array_equal(one["ids"], other["ids"])
