"""The API in use: progress, batches, folders, tensors, data loaders, training, results as dicts."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, make_image, make_model
from PIL import Image

import cn_clip
from cn_clip import weights
from cn_clip.calibration import read_calibration
from cn_clip.embedder import Embedder
from cn_clip.errors import ImageError, UsageError
from cn_clip.hub import EMBEDDED_FOLDER


@pytest.fixture(params=["vit", "efficientnet_lite"])
def embedder(request):
    return Embedder.from_model(make_model(TINY[request.param]))


@pytest.fixture
def folder(tiny_model, tmp_path):
    weights.save_folder(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def test_progress_is_called_with_the_items_done_and_the_total(embedder):
    images = [make_image(seed) for seed in range(5)]
    calls = []
    embedder.embed_images(images, batch_size=2, progress=lambda *call: calls.append(call))
    assert calls == [(2, 5), (4, 5), (5, 5)]
    calls.clear()
    embedder.embed_images(iter(images), batch_size=4, progress=lambda *call: calls.append(call))
    assert calls == [(4, None), (5, None)]
    calls.clear()
    embedder.embed_texts(["猫", "狗", "一只鸟"], progress=lambda *call: calls.append(call))
    assert calls[-1] == (3, 3) and [done for done, _ in calls] == sorted({d for d, _ in calls})
    calls.clear()
    readable = [images[0], b"broken", images[1]]
    embedder.embed_readable(readable, progress=lambda *call: calls.append(call))
    assert calls[-1] == (3, 3)


def test_progress_true_shows_a_bar_on_stderr(embedder, capsys):
    embedder.embed_images([make_image()] * 3, progress=True)
    embedder.embed_texts(["猫"] * 3, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "embedding images" in err and "embedding texts" in err and "100%" in err


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_the_batch_size_changes_no_embedding(embedder, batch_size):
    images = [make_image(seed) for seed in range(5)]
    texts = ["猫", "一只在草地上奔跑的棕色小狗", "", "火箭", "长" * 45]
    np.testing.assert_allclose(
        embedder.embed_images(images, batch_size=batch_size),
        embedder.embed_images(images),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        embedder.embed_texts(texts, batch_size=batch_size), embedder.embed_texts(texts), atol=1e-5
    )


def test_the_batch_size_is_the_number_of_rows_that_the_model_gets(embedder, monkeypatch):
    rows = []
    for name in ("run_images", "run_texts"):
        real = getattr(embedder.backend, name)
        monkeypatch.setattr(
            embedder.backend, name, lambda *a, real=real: rows.append(len(a[0])) or real(*a)
        )
    embedder.embed_images([make_image()] * 7, batch_size=3)
    embedder.embed_texts(["猫"] * 7, batch_size=3)
    assert rows == [3, 3, 1, 3, 3, 1]


@pytest.mark.parametrize("call", ["embed_images", "embed_readable", "embed_texts"])
def test_a_batch_size_below_one_is_refused(embedder, call):
    with pytest.raises(UsageError, match="batch_size 0 is below 1"):
        getattr(embedder, call)(["x"], batch_size=0)


def test_a_folder_is_its_images_in_the_order_of_find_images(embedder, image_folder):
    (image_folder / "deeper").mkdir()
    make_image(9).save(image_folder / "deeper" / "9.png")
    files = cn_clip.find_images([image_folder])
    assert len(files) == 4
    for given in (image_folder, str(image_folder)):
        np.testing.assert_array_equal(embedder.embed_images(given), embedder.embed_images(files))
    result = cn_clip.classify(embedder, image_folder, ["猫", "狗"])
    assert len(result) == 4
    (image_folder / "empty").mkdir()
    with pytest.raises(ImageError, match="holds no image"):
        embedder.embed_images(image_folder / "empty")


def test_pixels_in_tensors_are_images(embedder):
    image = make_image()
    array = np.asarray(image)
    expected = embedder.embed_images(image)
    channels_first = torch.from_numpy(array.transpose(2, 0, 1).copy())
    for tensor in (
        channels_first,
        torch.from_numpy(array.copy()),
        channels_first.requires_grad_(False),
    ):
        np.testing.assert_allclose(embedder.embed_images(tensor), expected, atol=1e-6)
    several = embedder.embed_images(torch.stack([channels_first] * 3))
    np.testing.assert_allclose(several, np.tile(expected, (3, 1)), atol=1e-5)
    grey = torch.from_numpy(np.asarray(image.convert("L"))[None].copy())
    np.testing.assert_allclose(
        embedder.embed_images(grey), embedder.embed_images(image.convert("L")), atol=1e-6
    )


def test_outputs_of_preprocess_and_tokenize_embed_as_the_originals(embedder):
    images = [make_image(seed) for seed in range(3)]
    expected = embedder.embed_images(images)
    batch = torch.stack([embedder.preprocess(image) for image in images])
    assert batch.dtype == torch.float32 and batch.min() < 0
    np.testing.assert_allclose(embedder.embed_images(batch), expected, atol=1e-5)
    np.testing.assert_allclose(embedder.embed_images(batch[0]), expected[:1], atol=1e-5)
    mixed = [batch[0], images[1], batch[2].double()]
    np.testing.assert_allclose(embedder.embed_images(mixed), expected, atol=1e-5)
    assert torch.equal(embedder.preprocess(batch[0]), batch[0])
    texts = ["猫", "", "一只在草地上奔跑的棕色小狗"]
    ids = embedder.tokenize(texts)
    assert ids.shape == (3, 52) and ids.dtype == torch.int64
    np.testing.assert_allclose(embedder.embed_texts(ids), embedder.embed_texts(texts), atol=1e-5)
    assert embedder.embed_texts(ids[:0]).shape == (0, 32)
    assert np.isfinite(embedder.embed_texts(torch.zeros(1, 5, dtype=torch.int64))).all()


def test_tensors_that_are_neither_are_refused(embedder):
    with pytest.raises(ImageError, match=r"float tensor of shape \(3, 5, 5\) is not an output"):
        embedder.embed_images(torch.zeros(3, 5, 5))
    with pytest.raises(ImageError):
        embedder.embed_images(torch.zeros(7, 9, 9, dtype=torch.uint8))
    for ids in (torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.full((1, 4), -1)):
        with pytest.raises(UsageError, match="is not token ids"):
            embedder.embed_texts(ids)
    for ids in (torch.full((1, 4), 99_999), torch.ones((1, 600), dtype=torch.int64)):
        with pytest.raises(UsageError, match="the model has 21128 tokens"):
            embedder.embed_texts(ids)


def test_preprocess_gives_the_pixels_that_the_embedder_embeds():
    """EXIF orientation and the background are those of the embedder, not of torchvision."""
    embedder = Embedder.from_model(make_model(TINY["efficientnet_lite"]))
    model = embedder.backend.model
    for image in (make_image(), Image.new("RGBA", (9, 9), (0, 0, 0, 0)), make_image(mode="L")):
        with torch.no_grad():
            features = model.encode_image(embedder.preprocess(image)[None])
        unit = torch.nn.functional.normalize(features).numpy()
        np.testing.assert_allclose(unit, embedder.embed_images(image), atol=1e-6)


def test_both_functions_are_pickled_without_the_model(embedder):
    for function in (embedder.preprocess, embedder.tokenize):
        content = pickle.dumps(function)
        assert len(content) < 3000
        assert type(pickle.loads(content)) is type(function)


LOADER = """
import sys
import numpy, torch
import cn_clip

class Pairs(torch.utils.data.Dataset):
    def __init__(self, files, preprocess, tokenize):
        self.files, self.preprocess, self.tokenize = files, preprocess, tokenize
    def __len__(self):
        return len(self.files)
    def __getitem__(self, index):
        return self.preprocess(self.files[index]), self.tokenize("一只猫")[0]

if __name__ == "__main__":
    embedder = cn_clip.load(sys.argv[1])
    files = cn_clip.find_images([sys.argv[2]])
    pairs = Pairs(files, embedder.preprocess, embedder.tokenize)
    loader = torch.utils.data.DataLoader(
        pairs, batch_size=2, num_workers=1, multiprocessing_context="spawn"
    )
    images, ids = zip(*loader)
    rows = embedder.embed_images(torch.cat(images)), embedder.embed_texts(torch.cat(ids))
    assert numpy.allclose(rows[0], embedder.embed_images(files), atol=1e-5)
    assert numpy.allclose(rows[1], embedder.embed_texts(["一只猫"]), atol=1e-5)
    print("equal", len(files))
"""


def test_a_data_loader_with_spawned_workers_takes_them(folder, image_folder, tmp_path):
    (tmp_path / "loader.py").write_text(LOADER, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "loader.py"), str(folder), str(image_folder)],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "equal 3\n", done.stderr


def test_a_trainable_model_learns_and_leaves_the_embedder_as_it_was(folder):
    embedder = cn_clip.load(folder)
    images, texts = [make_image(seed) for seed in range(8)], [f"第{n}张" for n in range(8)]
    before = embedder.embed_images(images)
    model = embedder.trainable_model().train()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    pixels = torch.stack([embedder.preprocess(image) for image in images])
    ids = embedder.tokenize(texts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _step in range(8):
        image, text, scale = model(pixels, ids)
        logits = scale * image @ text.T
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(embedder.embed_images(images), before)
    trained = Embedder.from_model(model.eval())
    assert np.abs(trained.embed_images(images) - before).max() > 1e-3
    again = trained.trainable_model()
    assert again is not model and torch.equal(again.logit_scale, model.logit_scale)


def test_an_embedder_is_pickled_with_its_model(folder):
    embedder = cn_clip.load(folder)
    before = embedder.embed_images(make_image())  # starts the decoding threads
    again = pickle.loads(pickle.dumps(embedder))
    np.testing.assert_array_equal(again.embed_images(make_image()), before)
    assert again.fingerprint == embedder.fingerprint


def test_an_export_cannot_be_trained(embedder):
    export = Embedder(embedder.backend, embedder.config, fingerprint=lambda: None)
    with pytest.raises(UsageError, match="is an export, which cannot be trained"):
        export.trainable_model()


@pytest.mark.parametrize(("short", "full"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_short_names_of_precisions_are_the_full_ones(folder, short, full, capsys):
    assert cn_clip.load(folder, precision=short).backend.precision == full
    from cn_clip.cli import run

    assert run(["models", "--json"]) == 0
    assert run(["embed", "texts", "nothing.txt", "--out", "x.npz", "--precision", short]) == 2
    assert "nothing.txt" in capsys.readouterr().err  # and not the precision
    if short == "fp32":
        assert run(["export", "--model", "nothing", "--out", "x", "--precision", short]) == 2
        assert "unknown model 'nothing'" in capsys.readouterr().err


def test_classifications_are_indexed_and_turned_into_dicts(embedder):
    images = [make_image(seed) for seed in range(3)]
    result = cn_clip.classify(embedder, images, ["猫", "狗", "火箭"], progress=lambda *_: None)
    assert len(result) == 3
    first = result[0]
    assert [p.label for p in first] == [label for label, _, _ in result.top(3)[0]]
    assert first[0].probability == max(p.probability for p in first) and first[0].match is None
    assert result[-1] == result[2] == list(result)[2]
    with pytest.raises(IndexError):
        result[3]
    dicts = result.to_dicts(top=1)
    assert json.loads(json.dumps(dicts)) == dicts
    assert dicts[0] == {
        "predictions": [
            {
                "label": first[0].label,
                "probability": first[0].probability,
                "cosine": first[0].cosine,
            }
        ]
    }
    assert all(len(row["predictions"]) == 3 for row in result.to_dicts())


def test_a_calibrated_classification_has_matches():
    embedder = cn_clip.load()
    calibration = read_calibration(EMBEDDED_FOLDER / "calibration.json")
    result = cn_clip.classify(embedder, make_image(), ["猫", "狗"], calibration=calibration)
    (row,) = result.to_dicts()
    assert 0 <= row["predictions"][0]["match"] <= 1 and row["none_of_these"] in (True, False)
    assert result[0][0].match == row["predictions"][0]["match"]


@pytest.mark.parametrize("out", ["e.npz", "e.jsonl", "e"])
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_embeddings_are_read_back_with_their_metadata(folder, image_folder, tmp_path, kind, out):
    from cn_clip.cli import run

    (tmp_path / "texts.txt").write_text("猫\n狗\n", encoding="utf-8")
    source = image_folder if kind == "images" else tmp_path / "texts.txt"
    command = ["embed", kind, str(source), "--out", str(tmp_path / out), "--model", str(folder)]
    assert run(command) == 0
    read = cn_clip.embeddings.read(tmp_path / out)
    embedder = cn_clip.load(folder)
    expected = embedder.embed_images(image_folder) if kind == "images" else None
    assert read.kind == kind and read.about["fingerprint"] == embedder.fingerprint
    assert read.about["normalized"] is True and len(read.ids) == len(read.vectors)
    if expected is not None:
        np.testing.assert_allclose(read.vectors, expected, atol=1e-5)


def test_embeddings_of_the_official_package_are_read_without_metadata(tmp_path):
    for key, kind in (("image_id", "images"), ("text_id", "texts")):
        path = tmp_path / f"{kind}.jsonl"
        path.write_text(json.dumps({key: 7, "feature": [0.6, 0.8]}) + "\n", encoding="utf-8")
        read = cn_clip.embeddings.read(str(path))
        assert (read.kind, read.ids, read.about) == (kind, ["7"], {})
    with pytest.raises(UsageError, match="no embeddings at"):
        cn_clip.embeddings.read(tmp_path / "none.npz")
