"""Loading and embedding through the public API."""

import os
import warnings

import numpy as np
import pytest
import torch
from conftest import TINY, cosines, encoded, make_image, make_model
from PIL import Image

import cn_clip
from cn_clip import weights
from cn_clip.calibration import read_calibration
from cn_clip.embedder import Embedder
from cn_clip.errors import CheckpointError, ImageError, UnknownModelError, UsageError
from cn_clip.hub import EMBEDDED_FOLDER
from cn_clip.image.decode import normalize, read_image, to_pixels


@pytest.fixture
def embedder(tiny_model):
    return Embedder.from_model(tiny_model)


@pytest.fixture
def folder(tiny_model, tmp_path):
    weights.save_folder(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def test_load_takes_our_folder_and_an_official_file_without_model_names(tiny_model, tmp_path):
    weights.save_folder(tiny_model, tmp_path / "model")
    weights.save_official(tiny_model, tmp_path / "model.pt")
    image = make_image()
    from_folder = cn_clip.load(tmp_path / "model")
    from_file = cn_clip.load(str(tmp_path / "model.pt"))
    a, b = from_folder.embed_images(image), from_file.embed_images(image)
    np.testing.assert_array_equal(a, b)
    assert from_folder.dim == a.shape[1] == 32
    assert from_folder.logit_scale == pytest.approx(1 / 0.07)


def test_image_embeddings_are_the_models_normalised_features(embedder, tiny_model):
    images = [make_image(seed) for seed in range(3)]
    pixels = np.stack([normalize(to_pixels(image, 32)) for image in images])
    with torch.inference_mode():
        features = tiny_model.encode_image(torch.from_numpy(pixels)).numpy()
    embeddings = embedder.embed_images(images)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(cosines(embeddings, features), 1, atol=1e-6)


def test_paths_bytes_arrays_and_pil_images_give_the_same_embedding(embedder, tmp_path):
    image = make_image()
    content = encoded(image, "PNG")
    (tmp_path / "a.png").write_bytes(content)
    array = np.asarray(image)
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), content, image, array]
    embeddings = embedder.embed_images(sources)
    np.testing.assert_allclose(embeddings, np.tile(embeddings[:1], (5, 1)), atol=1e-6)
    for one in sources:  # a single picture need not be wrapped in a list
        assert embedder.embed_images(one).shape == (1, 32)
    assert embedder.embed_images(np.stack([array, array])).shape == (2, 32)


def test_any_number_of_images_keeps_its_order(embedder):
    arrays = [np.full((8, 8, 3), value, np.uint8) for value in range(200)]
    together = embedder.embed_images(iter(arrays))
    assert together.shape == (200, 32)
    for index in (0, 31, 32, 63, 64, 199):
        alone = embedder.embed_images(arrays[index])[0]
        np.testing.assert_allclose(together[index], alone, atol=1e-5)


def test_empty_inputs_give_empty_embeddings(embedder):
    assert embedder.embed_images([]).shape == embedder.embed_texts([]).shape == (0, 32)


def test_text_embeddings_do_not_depend_on_their_batch(embedder):
    texts = ["猫", "", "一只在草地上奔跑的棕色小狗", "a dog", "猫", "长" * 49] * 60
    together = embedder.embed_texts(texts)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for index in range(6):
        alone = embedder.embed_texts(texts[index])[0]
        np.testing.assert_allclose(together[index::6], np.tile(alone, (60, 1)), atol=1e-5)


def test_an_empty_text_has_an_embedding(embedder):
    assert np.isfinite(embedder.embed_texts("")).all()


def test_100_000_texts_at_once():
    model = make_model(TINY["vit"])
    model.bert.encoder.layer = model.bert.encoder.layer[:1]
    texts = (f"第{i % 1000}张" for i in range(100_000))  # more than are tokenized at a time
    embeddings = Embedder.from_model(model).embed_texts(texts)
    assert embeddings.shape == (100_000, 32)
    np.testing.assert_allclose(embeddings[:1000], embeddings[-1000:], atol=1e-5)


def test_one_lazily_opened_image_can_be_given_many_times(embedder, tmp_path):
    make_image(size=(1500, 1500)).save(tmp_path / "large.jpg")
    with Image.open(tmp_path / "large.jpg") as image:
        embeddings = embedder.embed_images([image] * 8)
    np.testing.assert_allclose(embeddings, np.tile(embeddings[:1], (8, 1)), atol=1e-6)


def test_decoding_stops_after_an_error_of_the_model(embedder, monkeypatch):
    decoded = []
    real = embedder.prepare_image
    monkeypatch.setattr(embedder, "prepare_image", lambda s: decoded.append(1) or real(s))
    monkeypatch.setattr(embedder.backend, "run_images", lambda pixels: 1 / 0)
    large = encoded(make_image(size=(1500, 1500)), "JPEG")
    with pytest.raises(ZeroDivisionError):
        embedder.embed_images([large] * 500)
    assert len(decoded) < 150


def test_an_unreadable_image_is_named(embedder, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(encoded(make_image(), "JPEG")[:500])
    with pytest.raises(ImageError, match=r"broken\.jpg is damaged"):
        embedder.embed_images([make_image(), tmp_path / "broken.jpg"])
    with pytest.raises(ImageError, match="not an image"):
        embedder.embed_images([3])


def test_embed_readable_returns_embeddings_and_errors(embedder):
    good = [make_image(0), b"broken", make_image(1)]
    embeddings, errors = embedder.embed_readable(good)
    assert list(errors) == [1]
    np.testing.assert_allclose(embeddings, embedder.embed_images([good[0], good[2]]), atol=1e-5)
    assert embedder.embed_readable([])[0].shape == (0, 32)


def test_exif_orientation_and_the_background_colour_are_applied():
    embedder = Embedder.from_model(make_model(TINY["efficientnet_lite"]))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image = make_image()
    turned = encoded(image, "PNG", exif=exif)
    np.testing.assert_allclose(
        embedder.embed_images(turned),
        embedder.embed_images(image.transpose(Image.Transpose.ROTATE_180)),
        atol=1e-5,
    )
    clear = Image.new("RGBA", (9, 9), (0, 0, 0, 0))
    white = Image.new("RGB", (9, 9), "white")
    np.testing.assert_array_equal(embedder.embed_images(clear), embedder.embed_images(white))


def test_max_pixels_refuses_larger_images_and_keeps_the_fingerprint(folder):
    image = np.zeros((30, 40, 3), np.uint8)
    default, limited = cn_clip.load(folder), cn_clip.load(folder, max_pixels=1200)
    np.testing.assert_array_equal(limited.embed_images(image), default.embed_images(image))
    assert limited.fingerprint == default.fingerprint
    with pytest.raises(ImageError, match=r"40 x 30 pixels, above the limit of 1,199"):
        cn_clip.load(folder, max_pixels=1199).embed_images(image)
    with pytest.raises(UsageError, match="max_pixels 0 is below 1"):
        cn_clip.load(folder, max_pixels=0)


def test_fast_decode_changes_embeddings_only_slightly(folder):
    content = encoded(make_image(size=(1600, 1200)), "JPEG", quality=95)
    exact, fast = (cn_clip.load(folder, fast_decode=on) for on in (False, True))
    assert cosines(exact.embed_images(content), fast.embed_images(content))[0] > 0.999
    assert read_image(content, fast_decode=32).size == (200, 150)
    assert exact.fingerprint != fast.fingerprint


def test_the_fingerprint_depends_on_weights_and_not_on_names(tiny_model, folder, tmp_path):
    first = cn_clip.load(folder).fingerprint
    assert cn_clip.load(folder).fingerprint == first
    weights.save_official(tiny_model, tmp_path / "model.pt")
    assert cn_clip.load(tmp_path / "model.pt").fingerprint == first
    assert cn_clip.load(folder, precision="bfloat16").fingerprint != first
    with torch.no_grad():
        tiny_model.text_projection[0, 0] += 0.01
    assert Embedder.from_model(tiny_model).fingerprint != first


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_stays_close_and_still_returns_float32(folder, precision):
    exact, low = cn_clip.load(folder), cn_clip.load(folder, precision=precision)
    for inputs in ("embed_images", [make_image()]), ("embed_texts", ["猫"]):
        a, b = (getattr(e, inputs[0])(inputs[1]) for e in (exact, low))
        assert b.dtype == np.float32
        assert cosines(a, b)[0] > 0.999


def test_embedding_is_deterministic(folder):
    embedder = cn_clip.load(folder)  # eval mode: no dropout
    for _ in range(2):
        np.testing.assert_array_equal(embedder.embed_texts(["猫"]), embedder.embed_texts(["猫"]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name_or_path": "ViT-B-61"}, UnknownModelError, "did you mean ViT-B-16"),
        ({"name_or_path": "vit-b-16"}, UnknownModelError, "did you mean ViT-B-16"),
        ({"name_or_path": "no/such/model.pt"}, UsageError, "no such file or folder"),
        ({"name_or_path": "./mini"}, UsageError, "no such file or folder"),
        ({"backend": "tensorrt"}, UsageError, "unknown backend 'tensorrt'"),
        ({"device": "toaster"}, UsageError, "device 'toaster' is not available"),
        ({"precision": "int3"}, UsageError, "unknown precision 'int3'"),
    ],
)
def test_loading_errors_name_the_remedy(folder, options, error, message):
    with pytest.raises(error, match=message):
        cn_clip.load(**({"name_or_path": folder} | options))


def test_an_input_of_another_type_is_named(embedder):
    with pytest.raises(UsageError, match="text 1 is 7"):
        embedder.embed_texts(["猫", 7])
    with pytest.raises(UsageError, match="None is neither a string"):
        embedder.embed_texts(None)
    with pytest.raises(ImageError, match="None is neither an image"):
        embedder.embed_images(None)


def test_weights_of_another_architecture_do_not_load(tmp_path):
    weights.save_folder(make_model(TINY["vit"]), tmp_path / "model")
    weights.save_folder(make_model(TINY["resnet"]), tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"do not fit tiny-vit: \d+ missing .* unexpected"):
        cn_clip.load(tmp_path / "model")


def test_a_file_of_another_model_under_an_official_name_is_refused_with_its_model(tmp_path):
    weights.save_official(make_model(TINY["resnet"]), tmp_path / "clip_cn_vit-b-16.pt")
    with pytest.raises(CheckpointError, match=r"holds resnet.* for 64 pixels, not ViT-B-16"):
        cn_clip.load("ViT-B-16", download_root=tmp_path)


def test_truncation_is_counted(embedder):
    before = embedder.tokenizer.truncated
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        embedder.embed_texts(["长" * 100, "短"])
    assert embedder.tokenizer.truncated == before + 1


def test_a_variant_names_the_model_it_is_derived_from(folder):
    exact = cn_clip.load(folder)
    assert exact.derived_from is None
    variants = [
        cn_clip.load(folder, precision="bfloat16"),
        cn_clip.load(folder, precision="float16"),
        cn_clip.load(folder, fast_decode=True),
        cn_clip.load(folder, fast_decode=True, precision="float16"),
    ]
    assert {each.derived_from for each in variants} == {exact.fingerprint}
    assert len({exact.fingerprint, *(each.fingerprint for each in variants)}) == 5


def test_the_shipped_calibration_has_the_fingerprint_of_mini():
    mini = cn_clip.load()
    assert read_calibration(EMBEDDED_FOLDER / "calibration.json").fingerprint == mini.fingerprint


def test_prepared_items_give_the_same_embeddings(embedder):
    images = [make_image(seed) for seed in range(3)]
    prepared = [embedder.prepare_image(each) for each in images]
    assert prepared[0].shape == (3, 32, 32) and prepared[0].dtype == np.uint8
    rows = embedder.embed_prepared_images(prepared)
    np.testing.assert_array_equal(rows, embedder.embed_images(images))
    texts = ["猫", "一只在草地上奔跑的小狗"]
    ids = embedder.prepare_texts(texts)
    np.testing.assert_array_equal(embedder.embed_prepared_texts(ids), embedder.embed_texts(texts))


def test_normalised_pixels_and_uint8_give_the_same_features(embedder):
    pixels = to_pixels(make_image(), 32)
    content = np.moveaxis(pixels, -1, 0)[None]
    np.testing.assert_array_equal(
        embedder.backend.run_images(np.ascontiguousarray(content)),
        embedder.backend.run_images(normalize(pixels)[None]),
    )


def test_the_batch_size_changes_only_rounding(tiny_model):
    images = [make_image(seed) for seed in range(5)]
    one, many = (Embedder.from_model(tiny_model, batch_size=size) for size in (1, 4))
    np.testing.assert_allclose(one.embed_images(images), many.embed_images(images), atol=1e-6)
    with pytest.raises(UsageError, match="batch_size 0 is below 1"):
        Embedder.from_model(tiny_model, batch_size=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_its_own_decoding_threads(embedder):
    before = embedder.embed_images(make_image())
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, embedder._pool().submit(bytes, b"works").result(timeout=20))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 5) == b"works"
    np.testing.assert_array_equal(before, embedder.embed_images(make_image()))
