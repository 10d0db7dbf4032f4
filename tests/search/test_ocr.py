"""Text in images: tiles and boxes with an engine that sees bars, and RapidOCR on Pillow's font."""

import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from cn_clip.errors import ImageError, UsageError
from cn_clip.search import ocr
from cn_clip.search.ocr import MAX_SIDE, TextReader


class BarEngine:
    """Sees each black bar, a run of dark rows, as a line whose text is its share of the width."""

    def __init__(self):
        self.shapes = []

    def __call__(self, pixels):
        self.shapes.append(pixels.shape)
        dark = pixels.max(axis=2) < 128
        edges = np.diff(np.concatenate([[0], dark.any(axis=1).astype(np.int8), [0]]))
        result = SimpleNamespace(txts=[], scores=[], boxes=[])
        for top, bottom in zip(
            np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True
        ):
            columns = np.flatnonzero(dark[(top + bottom) // 2])
            left, right = columns[0], columns[-1] + 1
            result.txts.append(f"{round(100 * (right - left) / pixels.shape[1])} %")
            result.scores.append(0.9)
            result.boxes.append([(left, top), (right, top), (right, bottom), (left, bottom)])
        return result if result.txts else SimpleNamespace()


@pytest.fixture
def bars(monkeypatch):
    engine = BarEngine()
    monkeypatch.setattr(ocr, "_load", lambda threads, min_score: (engine, "0"))
    return engine


def image_with_bars(size, bars):
    image = Image.new("RGB", size, "white")
    for box in bars:
        ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), "black")
    return image


def test_a_large_image_is_reduced_and_boxes_are_in_its_own_pixels(bars):
    image = image_with_bars((4000, 3000), [(400, 600, 2400, 900)])
    (line,) = TextReader().recognize(image)
    assert max(bars.shapes[0]) <= MAX_SIDE and line.text == "50 %"
    assert np.allclose(line.box, [(400, 600), (2400, 600), (2400, 900), (400, 900)], atol=4)


@pytest.mark.parametrize("height", [1200, 3000, 6000, 20_000])
def test_each_line_of_a_long_screenshot_is_seen_once(bars, height):
    boxes = [(0, top, 10 + top * 900 // height, top + 30) for top in range(40, height - 40, 170)]
    lines = TextReader().recognize(image_with_bars((1000, height), boxes))
    tops = [box[1] for box in boxes]
    whole = [line for line in lines if line.box[3][1] - line.box[0][1] > 20]
    assert np.allclose(sorted(line.box[0][1] for line in whole), tops, atol=height / 500)
    assert len(bars.shapes) <= ocr.MAX_TILES


def test_a_wide_image_is_cut_into_tiles_from_left_to_right(bars):
    lines = TextReader().recognize(image_with_bars((9000, 900), [(100, 100, 300, 200)]))
    assert len(bars.shapes) > 1 and max(map(max, bars.shapes)) <= MAX_SIDE
    assert len(lines) == 1 and np.allclose(lines[0].box[0], (100, 100), atol=8)


@pytest.mark.parametrize("size", [(1, 1), (5, 400), (1, 9000)])
def test_images_of_a_few_pixels_have_no_text(bars, size):
    assert TextReader().recognize(Image.new("RGB", size)) == []


def test_transparent_and_grey_images_are_read_on_white(bars):
    image = image_with_bars((200, 100), [(20, 20, 120, 50)])
    clear = image.convert("RGBA")
    clear.putalpha(Image.eval(image.convert("L"), lambda value: 255 - value))
    texts = [[line.text for line in TextReader().recognize(i)] for i in (clear, image.convert("L"))]
    assert texts == [["50 %"], ["50 %"]]


def test_an_error_of_one_image_is_its_own(bars, tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff broken")
    reader = TextReader()
    with pytest.raises(ImageError, match=r"a\.jpg"):
        reader.recognize(tmp_path / "a.jpg")
    monkeypatch.setattr(BarEngine, "__call__", lambda self, pixels: 1 / 0)
    with pytest.raises(ImageError, match="division by zero"):
        reader.recognize(Image.new("RGB", (100, 100)))


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime", "cv2"])
def test_without_rapidocr_the_error_says_how_to_install_it(monkeypatch, package):
    for name in ("rapidocr", "onnxruntime", "cv2"):
        monkeypatch.setitem(sys.modules, name, None if name == package else SimpleNamespace())
    with pytest.raises(UsageError, match=rf"{package}.*: pip install rapidocr onnxruntime"):
        TextReader()


def test_a_damaged_package_is_named(monkeypatch):
    broken = SimpleNamespace(__file__="/nowhere/__init__.py", RapidOCR=lambda params: 1 / 0)
    for name, module in (("rapidocr", broken), ("onnxruntime", broken), ("cv2", broken)):
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(UsageError, match=r"rapidocr does not start.*install it again"):
        TextReader()


@pytest.fixture(scope="module")
def reader():
    pytest.importorskip("rapidocr")
    return TextReader(threads=1)


def test_rapidocr_reads_latin_letters_and_digits_in_the_default_font(reader, capfd):
    image = Image.new("RGB", (400, 160), "white")
    pen = ImageDraw.Draw(image)
    pen.text((30, 20), "NO SMOKING", "black", ImageFont.load_default(36))
    pen.text((30, 90), "Room 42", "navy", ImageFont.load_default(36))
    lines = reader.recognize(image)
    assert [line.text.replace(" ", "") for line in lines] == ["NOSMOKING", "Room42"]
    assert all(line.score > 0.8 and len(line.box) == 4 for line in lines)
    (left, top), _right, (_x, bottom), _left = lines[0].box
    assert 15 < left < 45 and 10 < top < 40 and 45 < bottom < 75
    assert reader.recognize(Image.new("RGB", (200, 200), "white")) == []
    assert capfd.readouterr() == ("", "")  # RapidOCR logs to the terminal
    assert "rapidocr" in reader.name


def test_rapidocr_reads_in_threads_what_it_reads_in_one(reader):
    images = []
    for word in ("Alpha 1", "Beta 22", "Gamma 333", "Delta 4444"):
        images.append(Image.new("RGB", (300, 80), "white"))
        ImageDraw.Draw(images[-1]).text((20, 15), word, "black", ImageFont.load_default(32))
    expected = [reader.recognize(image) for image in images]
    results = [None] * len(images)

    def read(n):
        results[n] = reader.recognize(images[n])

    threads = [threading.Thread(target=read, args=(n,)) for n in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected and all(expected)
