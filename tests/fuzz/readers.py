"""Every reader of the package: a small valid file of its format, and a function that reads it as
far as a command does."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

TESTS = Path(__file__).parents[1]
sys.path[:0] = [path for path in (str(TESTS), str(TESTS / "golden")) if path not in sys.path]

from fuzz import mutants  # noqa: E402

from cn_clip.errors import CNClipError  # noqa: E402


@dataclass(frozen=True)
class Format:
    """How a valid file is written and read; patterns of the files to damage; and an own damage
    function, for formats such as databases."""

    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    damaged: tuple[str, ...] = ("**/*",)
    own: Callable[[Random, Path], None] | None = None
    others: list[bytes] = field(default_factory=list)


def step() -> None:
    """Mark a new step; every step has the whole deadline."""


# What commands do with their input


def tiny_config() -> Any:
    from cn_clip.config import ModelConfig, TextConfig, VisionConfig

    text = TextConfig(hidden_size=8, layers=1, heads=1, intermediate_size=16, max_positions=64)
    return ModelConfig("tiny", 8, VisionConfig("vit", 16, 64, (1,), 8), text)


@cache
def tiny() -> Any:
    import torch

    from cn_clip.model.clip import CLIP, initialize

    model = CLIP(tiny_config())
    initialize(model, torch.Generator().manual_seed(0))
    return model.eval()


def run_model(path: Path) -> None:
    """Read weights, build the model, and run it on an image and texts, as `cn-clip embed` does."""
    from cn_clip.backends.torch import load_model
    from cn_clip.embedder import Embedder

    embedder = Embedder.from_model(load_model(path, device="cpu"))
    embedder.embed_images([np.zeros((20, 30, 3), np.uint8)])
    embedder.embed_texts(["一只猫", "a cat" * 40])


def use_image(content: Any) -> None:
    from cn_clip.data.curate.perceptual_hash import (
        hash_image,
        mirrored_and_cropped,
        without_margins,
    )
    from cn_clip.data.encode import Encoding, encode_image
    from cn_clip.html.page import thumbnail
    from cn_clip.image.decode import normalize, read_image, to_pixels

    normalize(to_pixels(read_image(content), 32))
    step()
    read_image(content, fast_decode=32)
    step()
    opaque = read_image(content, background="white")
    hash_image(opaque)
    step()
    for each in mirrored_and_cropped(without_margins(opaque)):
        hash_image(each)
    del opaque, each  # no command holds it any longer
    step()
    data = content if isinstance(content, bytes) else Path(content).read_bytes()
    thumbnail(data)
    for encoding in (Encoding(), Encoding(max_side=20), Encoding(format="WEBP")):
        step()
        encode_image(data, encoding)


def use_source(uri: str, folder: Path) -> None:
    """Check, pack, decontaminate and measure a source, then make pixels and tokens of its pairs."""
    from cn_clip.data.curate.check import check
    from cn_clip.data.curate.check_report import write_report
    from cn_clip.data.curate.decontaminate import (
        decontaminate,
        read_removed,
        write_removed,
        write_removed_report,
    )
    from cn_clip.data.encode import Encoding
    from cn_clip.data.pack import pack
    from cn_clip.data.sources.open import WeightedSource, open_source
    from cn_clip.eval.dataset import eval_set_of
    from cn_clip.tokenizer import default_tokenizer

    source = open_source(uri)
    pickle.dumps(source)  # as it is sent to workers
    out = folder / ".out"

    def removed() -> None:
        found = decontaminate(source, source)
        write_removed(found, source, source, out / "removed.jsonl")
        read_removed(out / "removed.jsonl", source)
        write_removed_report(found, source, source, out / "page.html")

    def pairs() -> None:
        for index in range(len(source)):
            step()
            try:
                default_tokenizer()(source.row(index).text)
                use_image(source.image(index))
            except CNClipError:
                source.where(index)

    out.mkdir()
    first_error: CNClipError | None = None
    for job in (
        lambda: write_report(check(source), source, out / "check.html"),
        lambda: pack(source, out / "tar", encoding=Encoding(max_side=24)),
        lambda: pack(source, out / "tsv", to="tsv"),
        removed,
        lambda: eval_set_of([WeightedSource(source)], merge=False),
        lambda: eval_set_of([WeightedSource(source)]),
        pairs,
    ):
        step()
        try:
            job()
        except CNClipError as error:
            first_error = first_error or error
    if first_error:
        raise first_error


def use_list(kind: str, path: Path) -> None:
    """Embed a list, as far as pixels and tokens, and write and read back the features."""
    from cn_clip.embeddings.extract import extract
    from cn_clip.embeddings.files import read_embeddings
    from cn_clip.embeddings.inputs import read_images, read_texts

    read = read_images if kind == "images" else read_texts
    out = path.parent / ".out.jsonl"
    extract(_FakeEmbedder(), kind, read([str(path)]), out)  # type: ignore[arg-type]
    read_embeddings(out, kind)  # type: ignore[arg-type]


class _FakeEmbedder:
    """An embedder that decodes and tokenizes, and runs no model."""

    name, dim, logit_scale, fingerprint = "fake", 4, 100.0, "0" * 32

    def embed_images(self, images: Any) -> Any:
        rows, errors = self.embed_readable(images)
        for error in errors.values():
            raise error
        return rows

    def embed_readable(self, images: Any) -> tuple[Any, dict[int, Exception]]:
        from cn_clip.errors import ImageError
        from cn_clip.image.decode import normalize, read_image, to_pixels

        rows, errors = [], {}
        for number, image in enumerate(images):
            try:
                rows.append(normalize(to_pixels(read_image(image), 8)).reshape(-1)[:4])
            except ImageError as error:
                errors[number] = error
        return np.array(rows, np.float32).reshape(-1, 4), errors

    def embed_texts(self, texts: Any) -> Any:
        from cn_clip.tokenizer import default_tokenizer

        texts = list(texts)
        return np.asarray(default_tokenizer()(texts), np.float32)[:, :4]


# Weights


def _torch_save(folder: Path, **options: Any) -> None:
    import torch

    state = {f"module.{name}": tensor.half() for name, tensor in tiny().state_dict().items()}
    whole = {"epoch": 3, "step": 7, "name": "x", "state_dict": state, "optimizer": {"lr": 0.1}}
    torch.save(whole, folder / "model.pt", **options)


def _write_torchscript(folder: Path) -> None:
    shutil.copy(TESTS / "golden" / "towers" / "openai_vit.pt", folder / "model.pt")


def _write_safetensors(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    half = {name: tensor.to(torch.float16) for name, tensor in tiny().state_dict().items()}
    save_file({k: v.contiguous() for k, v in half.items()}, folder / "model.safetensors")


def _write_folder(folder: Path) -> None:
    from cn_clip import weights

    weights.write_folder(tiny(), folder)


def _write_hugging_face(folder: Path) -> None:
    from cn_clip import weights

    weights.write_hugging_face(tiny(), folder)


def _write_shards(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    _write_hugging_face(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = sorted(tensors), {}
    for part in (1, 2):
        mine = names[part - 1 :: 2]
        name = f"model-0000{part}-of-00002.safetensors"
        save_file({each: tensors[each] for each in mine}, folder / name)
        index |= dict.fromkeys(mine, name)
    values = {"metadata": {"total_size": 1}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(values))


def _write_bert(folder: Path) -> None:
    import torch

    state = {k: v.half() for k, v in tiny().state_dict().items() if k.startswith("bert.")}
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_act": "gelu"}))


def _text_tower(folder: Path) -> None:
    from cn_clip.weights.towers import text_tower

    text_tower(folder)


def _image_tower(folder: Path) -> None:
    from cn_clip.weights.towers import image_tower

    image_tower(folder / "model.pt")


def _convert(folder: Path) -> None:
    from cn_clip.convert import convert

    convert(folder, folder.parent / "converted", to="safetensors", overwrite=True)


def _vocab(folder: Path) -> None:
    from cn_clip.tokenizer import Tokenizer

    Tokenizer(folder / "vocab.txt")(["一只猫", "cat"])


def _write_vocab(folder: Path) -> None:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "一", "只", "猫", "cat", "##s", "。"]
    (folder / "vocab.txt").write_text("\n".join(special) + "\n")


# Images


def _image(suffix: str, mode: str = "RGB", **options: Any) -> Format:
    def write(folder: Path) -> None:
        from conftest import make_image
        from PIL import Image

        image = make_image(3, (40, 30), "RGB")
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        elif mode == "F":
            image = Image.fromarray(np.asarray(image.convert("L"), np.float32) / 255)
        elif mode != "RGB":
            image = image.convert("RGBA").quantize(16) if mode == "Pa" else image.convert(mode)
        if options.get("append"):
            more = {k: v for k, v in options.items() if k != "append"}
            frames = [make_image(n, (40, 30)).convert(mode) for n in range(3)]
            image.save(folder / f"image{suffix}", save_all=True, append_images=frames, **more)
        else:
            image.save(folder / f"image{suffix}", **options)

    return Format(write, lambda folder: use_image(folder / f"image{suffix}"))


def _exif(folder: Path) -> None:
    from conftest import make_image
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "x" * 40
    make_image(1, (40, 30)).save(folder / "image.jpg", exif=exif, icc_profile=b"\0" * 140)


# Sources


def _source(
    write: str, file: str, kind: str, damaged: tuple[str, ...], options: str = "", own: Any = None
) -> Format:
    def make(folder: Path) -> None:
        from data import formats

        for name, content in formats.IMAGES.items():
            if write not in ("write_tar", "write_tsv", "write_lmdb"):
                (folder / f"{name}.jpg").write_bytes(content)
        getattr(formats, write)(folder)

    return Format(
        make,
        lambda folder: use_source(f"{kind}:{folder / file}{options}", folder),
        damaged,
        own,
    )


def _write_photos(folder: Path) -> None:
    from data.formats import IMAGES

    (folder / "photos").mkdir()
    for number, content in enumerate(IMAGES.values()):
        (folder / "photos" / f"{number}.jpg").write_bytes(content)
        (folder / "photos" / f"{number}.txt").write_text(f"第{number}张图\n另一句\n")


def _damaged_lmdb(rng: Random, folder: Path) -> None:
    """Write a pair, an image or a count of a database again, damaged."""
    import lmdb

    part = rng.choice(("pairs", "pairs", "imgs"))
    with (
        lmdb.open(str(folder / "lmdb" / part), map_size=1 << 24) as environment,
        environment.begin(write=True) as transaction,
    ):
        entries = [(bytes(k), bytes(v)) for k, v in transaction.cursor()]
        key, value = rng.choice(entries)
        pickled = part == "pairs" and not key.startswith(b"num")
        damaged = mutants.mutated(rng, value, ".pkl" if pickled else ".txt", [])
        transaction.put(key, damaged)
        if rng.random() < 0.2:
            transaction.delete(rng.choice(entries)[0])
    (folder / "lmdb" / part / "lock.mdb").unlink(missing_ok=True)


def _odd_paths(rng: Random, folder: Path) -> None:
    """Rename files, and put links, folders and devices where files should be."""
    import os

    files = sorted(each for each in folder.rglob("*") if each.is_file())
    for _ in range(rng.choice((1, 2))):
        chosen = rng.choice(files)
        if not chosen.is_file():
            continue
        how = rng.randrange(8)
        raw = os.fsencode(chosen)
        odd = (b".\xff", b"\n", b" ", b"\xed\xa0\xbd", b"\x1b[0m", b"%s{}", b"'\"")
        if how < 3:
            name = raw[:-4] + rng.choice(odd) + raw[-4:]
            os.rename(raw, name)
        elif how == 3:
            chosen.unlink()
            chosen.mkdir()
        elif how == 4:
            chosen.unlink()
            os.symlink(rng.choice((".", "..", chosen.name, "/dev/null", "/nowhere")), chosen)
        elif how == 5:
            chosen.unlink()
            os.mkfifo(chosen)
        elif how == 6:
            os.symlink("..", chosen.parent / f"loop{rng.randrange(9)}")
        else:
            shutil.copy(chosen, chosen.with_suffix(rng.choice((".PNG", ".jpeg", ".heic", ""))))


def _uri(folder: Path) -> None:
    """Open what a URI of a file says."""
    from cn_clip.data.sources.open import open_mix

    if not (folder / "uri.txt").exists():
        return
    text = (folder / "uri.txt").read_bytes().decode("utf-8", "surrogateescape")
    mix = open_mix([text.rstrip("\n")])
    for part in mix[:5]:
        for index in range(min(5, len(part.source))):
            try:
                part.source.row(index)
            except CNClipError:
                part.source.where(index)


def _write_gb18030(folder: Path) -> None:
    from data.formats import IMAGES, write_csv

    for name, content in IMAGES.items():
        (folder / f"{name}.jpg").write_bytes(content)
    write_csv(folder)
    text = (folder / "pairs.csv").read_text(encoding="utf-8")
    (folder / "pairs.csv").write_text(text, encoding="gb18030")


def _write_uri(folder: Path) -> None:
    from data.formats import IMAGES, write_csv

    for name, content in IMAGES.items():
        (folder / f"{name}.jpg").write_bytes(content)
    write_csv(folder)
    (folder / "uri.txt").write_text(
        f"0.5@csv:{folder}/{{pairs,pairs}}.csv?image=image&text=text&root={folder}&encoding=utf-8\n"
    )


# Embeddings, scores and files of a run


def _features(kind: str, write: str, name: str) -> Format:
    def make(folder: Path) -> None:
        from cn_clip.embeddings import files as features

        vectors = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
        ids: list[Any] = ["007", "a", "猫", "x", "8"]
        rows = features.EmbeddingsToWrite(
            kind, ids, ["p", "q", "r", "s", "t"], 8, lambda a, b: vectors[a:b],
            {"kind": kind, "model": "m"},
        )  # fmt: skip
        getattr(features, write)(rows, folder / name)

    def read(folder: Path) -> None:
        from cn_clip.embeddings.files import read_embeddings

        read_embeddings(folder / name, kind)  # type: ignore[arg-type]

    return Format(make, read)


def _captions(folder: Path) -> None:
    from cn_clip.embeddings.files import read_captions

    read_captions(folder / "features")


def _score(folder: Path) -> None:
    from cn_clip.eval.official_files import read_predictions, read_truth, score_predictions

    score_predictions(
        read_predictions(folder / "predictions.jsonl"), read_truth(folder / "texts.jsonl")
    )


def _score_back(folder: Path) -> None:
    from cn_clip.eval.official_files import read_predictions, read_truth, score_predictions

    found = read_predictions(folder / "tr_predictions.jsonl")
    score_predictions(found, read_truth(folder / "texts.tr.jsonl"))


def _copied(*names: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name in names:
            shutil.copy(TESTS / "golden" / "eval" / name, folder)

    return write


def _calibration(kind: str) -> Format:
    def write(folder: Path) -> None:
        from cn_clip.calibration import Calibration, Isotonic, Logistic, write_calibration

        curve: Any = Logistic(20.0, -6.0)
        if kind == "isotonic":
            curve = Isotonic((0.1, 0.2, 0.3), (0.0, 0.4, 0.9))
        found = Calibration(
            "tiny", "f" * 32, curve, 0.5, 0.9, {"search": 0.3, "labels": None},
            {"images": 3, "texts": 4, "pairs": 4, "non_pairs": 8}, "d" * 32, "2025-01-31",
        )  # fmt: skip
        write_calibration(found, folder / "calibration.json")

    def read(folder: Path) -> None:
        from cn_clip.calibration import probability, read_calibration

        found = read_calibration(folder / "calibration.json")
        shares = probability(found.curve, np.linspace(-1, 1, 50))
        assert np.isfinite(shares).all(), "a probability is no number"
        repr([found.thresholds["labels"], found.thresholds["search"]])

    return Format(write, read)


def _write_labelled(folder: Path) -> None:
    from data.formats import jpeg

    (folder / "label_cn.txt").write_text("猫\n狗\n火箭\n")
    for number in range(3):
        (folder / "test" / f"{number:03}").mkdir(parents=True)
        (folder / "test" / f"{number:03}" / f"{number}.jpg").write_bytes(jpeg(number))
    (folder / "index.json").write_text("[2, 0, 1]")
    lines = [f"test.zip@{n}.jpg {n},{(n + 1) % 3}" for n in range(3)]
    (folder / "test_ic.txt").write_text("\n".join(lines) + "\n")
    (folder / "templates.txt").write_text("一张{}的照片\n{}。\n")


def _labelled(folder: Path) -> None:
    from cn_clip.eval import zeroshot
    from cn_clip.eval.labelled import read_labelled

    found = read_labelled(folder, truth=folder / "test_ic.txt")
    scores = zeroshot.evaluate_zeroshot(
        _FakeEmbedder(), found, zeroshot.read_templates(str(folder / "templates.txt")),  # type: ignore[arg-type]
        metric="11-point-map",
    )  # fmt: skip
    zeroshot.submission(
        scores, found, model="m", dataset="voc-2007-classification", parameters=1, visual=1
    )


def _labels_file(folder: Path) -> None:
    from cn_clip import zeroshot
    from cn_clip.cli.classify import _read_labels

    names = zeroshot.distinct(_read_labels(None, str(folder / "labels.txt")))
    zeroshot.label_embeddings(_FakeEmbedder(), names, ("一张{}",))  # type: ignore[arg-type]


_RECIPE = """version = 1
[data]
train = ["jsonl:pairs.jsonl", "0.5@tar:{000..003}.tar"]
val = ["jsonl:val.jsonl"]
workers = 0
max_skipped_fraction = 0.1
[start]
checkpoint = "mini"
[machine]
precision = "fp32"
device = "cpu"
[output]
folder = "out"
log_every = 1
[[stages]]
name = "one"
steps = 4
freeze = ["visual.*"]
global_batch_size = 16
[stages.optimizer]
learning_rate = 0.001
warmup = 2
lr_multipliers = ["visual.*=0.1"]
[[stages]]
name = "two"
epochs = 2
global_batch_size = 16
[stages.lora]
rank = 4
"""


def from_toml(text: str) -> Any:
    from cn_clip.train.recipe.toml import build_recipe

    return build_recipe(tomllib.loads(text))


def _recipe(folder: Path) -> None:
    from cn_clip.train.recipe.toml import build_recipe, read_recipe

    recipe = build_recipe(read_recipe(str(folder / "recipe.toml")))
    from_toml(recipe.to_toml())


def _write_run(folder: Path) -> None:
    from cn_clip.train.run.checkpoint import Progress, save_state
    from cn_clip.train.run.run_dir import Outcome, write_outcome

    (folder / "recipe.toml").write_text(from_toml(_RECIPE).to_toml())
    for total in (3, 6):
        save_state(folder, Progress(total=total, before=0.5), _run_tensors(), keep=2)
    recalls = {f"{way}_r{k}": 0.1 for way in ("t2i", "i2t") for k in (1, 5, 10)}
    events: list[dict[str, Any]] = [
        {"kind": "start", "total": 0, "recipe": "r", "model": "tiny", "parameters": 9,
         "device": "cpu", "processes": 1, "pairs": 16, "origins": ["random"]},
        {"kind": "stage", "total": 0, "stage": "one", "number": 0, "step": 0, "steps": 6,
         "lr": 1e-3, "warmup": 1, "batch": 16, "trainable": 9, "batch_norm": None},
        {"kind": "warning", "total": 0, "text": "2 pairs are the same"},
    ]  # fmt: skip
    for n in range(4):
        common = {"total": n, "stage": "one", "time": 1.0, "step": n}
        events.append(
            common
            | {"kind": "step", "loss": 2.5, "mean_loss": 2.5, "lr": 1e-3, "logit_scale": 14.3,
               "pairs_per_second": 9.0, "skipped": 0, "gradient_norm": 1.0}
        )  # fmt: skip
        score = {"kind": "score", "before": None, "best": None, "mean_recall": 0.1 * n, **recalls}
        events.append(common | score)
    events.append({"kind": "end", "total": 3, "seconds": 7.5, "weights": "run/final"})
    lines = [json.dumps(event) for event in events]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    write_outcome(folder, Outcome("run", "run/final", 6, 9.5, [("before", 0.1), ("one", 0.4)]))
    vectors = np.zeros((3, 4), np.float16)
    np.savez(folder / "before.npz", images=vectors, texts=vectors)
    np.savez(folder / "after.npz", images=vectors, texts=vectors)


def _run_tensors() -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    model = {"a.weight": torch.randn(3, 4, generator=generator), "b": torch.zeros(5)}
    return {"model": model, "heads": {}, "optimizer": {"a.step": torch.ones(())}, "average": {}}


def _run(folder: Path) -> None:
    from cn_clip.train.run.checkpoint import load_tensors, read_progress, states
    from cn_clip.train.run.report import write_report
    from cn_clip.train.run.run_dir import prepare_folder

    write_report(folder, from_toml(_RECIPE), None)
    for state in states(folder):
        try:
            read_progress(state)
        finally:
            load_tensors(state, _run_tensors())
    prepare_folder(folder, from_toml(_RECIPE), True, True)
    prepare_folder(folder, from_toml(_RECIPE), True, False)


def _cache(folder: Path) -> None:
    import torch

    from cn_clip.data.loading.loader import Preparation
    from cn_clip.data.loading.sampler import BatchPart
    from cn_clip.data.sources.open import open_mix
    from cn_clip.train.batches.feature_cache import cache_image_features

    found = cache_image_features(
        open_mix([f"folder:{folder / 'photos'}"]),
        lambda pixels: pixels.float().mean((2, 3)),
        {"tower": "this"},
        Preparation(8),
        folder / "features",
        workers=0,
    )
    zeros = np.zeros(4, np.int64)
    rows = found.features(BatchPart(0, 0, zeros, np.arange(4)))
    assert rows.shape == (4, 3) and rows.dtype == torch.float32, rows.shape


def _write_cache(folder: Path) -> None:
    _write_photos(folder)
    (folder / "features").mkdir()
    _cache(folder)


def _pack_again(folder: Path, stop: bool = False) -> None:
    from cn_clip.data.pack import pack
    from cn_clip.data.sources.open import open_source

    def on_progress(done: int, _: int) -> None:
        if stop and done >= 2:
            raise KeyboardInterrupt

    source = open_source(f"folder:{folder / 'photos'}")
    pack(source, folder / "out", images_per_shard=1, on_progress=on_progress)


def _write_packed(folder: Path) -> None:
    """Pack, and stop on the way; the plan holds a digest of the folder's own path."""
    if not (folder / "photos").exists():
        _write_photos(folder)
    with suppress(KeyboardInterrupt):
        _pack_again(folder, stop=True)


def _damaged_packed(rng: Random, folder: Path) -> None:
    shutil.rmtree(folder / "out")
    _write_packed(folder)
    _damage_one(rng, sorted(each for each in (folder / "out").iterdir() if each.is_file()))


def _damage_one(rng: Random, files: list[Path]) -> None:
    chosen = rng.choice(files)
    suffix = chosen.suffix or ".json"
    chosen.write_bytes(mutants.mutated(rng, chosen.read_bytes(), suffix, []))


def _embed_again(folder: Path) -> None:
    use_list("images", folder / "list.txt")


def _write_embedded(folder: Path) -> None:
    from cn_clip.embeddings.extract import _PartStore

    _write_photos(folder)
    lines = [f"photos/{n}.jpg" for n in range(3)]
    (folder / "list.txt").write_text("\n".join(lines) + "\n")
    parts = folder / ".out.jsonl.parts"
    parts.mkdir()
    about = {
        "model": "fake", "fingerprint": "0" * 32, "kind": "images", "dim": 4, "normalized": True,
        "logit_scale": 100.0,
    }  # fmt: skip
    _PartStore(parts, about, overwrite=False).add(["a", "b"], np.zeros((2, 4), np.float32))


def _removed(folder: Path) -> None:
    from cn_clip.data.curate.decontaminate import read_removed
    from cn_clip.data.sources.open import open_source

    read_removed(folder / "removed.jsonl", open_source(f"folder:{folder / 'photos'}"))


def _write_removed(folder: Path) -> None:
    from cn_clip.data.curate.decontaminate import decontaminate, write_removed
    from cn_clip.data.sources.open import open_source

    _write_photos(folder)
    source = open_source(f"folder:{folder / 'photos'}")
    write_removed(decontaminate(source, source), source, source, folder / "removed.jsonl")


def _hub(folder: Path) -> None:
    from cn_clip.hub import _check_model_type

    _check_model_type("a/b", folder / "config.json")


# Lists


def _list(kind: str, name: str, text: str) -> Format:
    def write(folder: Path) -> None:
        from data.formats import IMAGES

        for number, content in enumerate(IMAGES.values()):
            (folder / f"{number}.jpg").write_bytes(content)
        (folder / name).write_text(text)

    return Format(write, lambda folder: use_list(kind, folder / name), (name,))


def _official_images(folder: Path) -> None:
    from data.formats import write_tsv

    write_tsv(folder)


def _evil(suffix: str) -> Callable[[Random, Path], None]:
    """Put a pickle that would run something in place of the valid one."""

    def damage(rng: Random, folder: Path) -> None:
        path = next(folder.glob(f"*{suffix}"))
        if rng.random() < 0.3:
            path.write_bytes(mutants.evil(rng))
        else:
            path.write_bytes(mutants.mutated(rng, path.read_bytes(), ".pt", []))

    return damage


_TEXTS = '{"text_id": 1, "text": "一只猫"}\n{"text_id": "2", "text": "火箭, 发射"}\n'
_IMAGES = '{"image": "0.jpg", "image_id": 7}\n{"image_path": "1.jpg", "image_id": "8"}\n'

FORMATS: dict[str, Format] = {
    "pt_zip": Format(_torch_save, lambda f: run_model(f / "model.pt"), own=_evil(".pt")),
    "pt_legacy": Format(
        lambda f: _torch_save(f, _use_new_zipfile_serialization=False),
        lambda f: run_model(f / "model.pt"),
        own=_evil(".pt"),
    ),
    "torchscript": Format(_write_torchscript, _image_tower, own=_evil(".pt")),
    "safetensors": Format(_write_safetensors, lambda f: run_model(f / "model.safetensors")),
    "folder_ours": Format(_write_folder, run_model, ("config.json", "*.json", "*.safetensors")),
    "folder_hf": Format(_write_hugging_face, run_model),
    "folder_shards": Format(_write_shards, run_model),
    "folder_convert": Format(_write_folder, _convert),
    "tower_text": Format(_write_bert, _text_tower),
    "vocab": Format(_write_vocab, _vocab),
    "hub": Format(_write_folder, _hub, ("config.json",)),
    "jpeg": _image(".jpg"),
    "jpeg_exif": Format(_exif, lambda folder: use_image(folder / "image.jpg")),
    "jpeg_cmyk": _image(".jpg", "CMYK"),
    "jpeg_progressive": _image(".jpg", progressive=True),
    "png": _image(".png"),
    "png_rgba": _image(".png", "RGBA"),
    "png_palette": _image(".png", "Pa"),
    "png_grey": _image(".png", "L"),
    "png_grey_alpha": _image(".png", "LA"),
    "png_one_bit": _image(".png", "1"),
    "png_16": _image(".png", "I;16"),
    "png_animated": _image(".png", append=True),
    "webp": _image(".webp"),
    "webp_lossless": _image(".webp", "RGBA", lossless=True),
    "webp_animated": _image(".webp", append=True),
    "gif": _image(".gif", "P"),
    "gif_animated": _image(".gif", append=True),
    "bmp": _image(".bmp"),
    "bmp_palette": _image(".bmp", "P"),
    "tiff": _image(".tif"),
    "tiff_lzw": _image(".tif", compression="tiff_lzw"),
    "tiff_jpeg": _image(".tif", compression="jpeg"),
    "tiff_16": _image(".tif", "I;16"),
    "tiff_float": _image(".tif", "F"),
    "tiff_lab": _image(".tif", "LAB"),
    "tiff_pages": _image(".tif", append=True),
    "csv": _source("write_csv", "pairs.csv", "csv", ("pairs.csv",)),
    "csv_gb18030": Format(
        _write_gb18030,
        lambda folder: use_source(f"csv:{folder / 'pairs.csv'}?encoding=gb18030", folder),
        ("pairs.csv",),
    ),
    "jsonl": _source("write_jsonl", "pairs.jsonl", "jsonl", ("pairs.jsonl",)),
    "parquet": _source("write_parquet", "pairs.parquet", "parquet", ("pairs.parquet",)),
    "tsv": _source("write_tsv", "train_imgs.tsv", "tsv", ("*.tsv", "*.jsonl")),
    "tsv_unpaired": _source(
        "write_tsv", "train_imgs.tsv", "tsv", ("*.tsv", "*.jsonl"), "?unpaired=yes"
    ),
    "lmdb": _source("write_lmdb", "lmdb", "lmdb", ("lmdb/*/data.mdb",), own=_damaged_lmdb),
    "tar": _source("write_tar", "000.tar", "tar", ("000.tar",)),
    "photos": Format(
        _write_photos,
        lambda folder: use_source(f"folder:{folder / 'photos'}", folder),
        ("photos/*",),
        _odd_paths,
    ),
    "uri": Format(_write_uri, _uri, ("uri.txt",)),
    "images_txt": _list("images", "list.txt", "0.jpg\n1.jpg\n./2.jpg\n"),
    "images_jsonl": _list("images", "list.jsonl", _IMAGES),
    "images_tsv": Format(
        _official_images, lambda f: use_list("images", f / "train_imgs.tsv"), ("*.tsv",)
    ),
    "texts_txt": _list("texts", "list.txt", "一只猫\n火箭\n"),
    "texts_jsonl": _list("texts", "list.jsonl", _TEXTS),
    "features_npz": _features("images", "write_npz", "features.npz"),
    "features_jsonl": _features("texts", "write_jsonl", "features.jsonl"),
    "features_folder": _features("images", "write_clip_retrieval", "features"),
    "captions": replace(_features("texts", "write_clip_retrieval", "features"), read=_captions),
    "predictions": Format(_copied("predictions.jsonl", "texts.jsonl"), _score),
    "tr_predictions": Format(_copied("tr_predictions.jsonl", "texts.tr.jsonl"), _score_back),
    "calibration": _calibration("logistic"),
    "calibration_isotonic": _calibration("isotonic"),
    "labelled": Format(_write_labelled, _labelled, ("*.txt", "*.json")),
    "labels": Format(
        lambda f: (f / "labels.txt").write_text("猫\n狗\n火箭\n") and None, _labels_file
    ),
    "recipe": Format(lambda f: (f / "recipe.toml").write_text(_RECIPE) and None, _recipe),
    "run": Format(_write_run, _run),
    "cache": Format(_write_cache, _cache, ("features/*",)),
    "packed": Format(_write_packed, _pack_again, (), _damaged_packed),
    "embedded": Format(_write_embedded, _embed_again, (".out.jsonl.parts/*",)),
    "removed": Format(_write_removed, _removed, ("removed.jsonl",)),
}


_SUFFIXES = {".bin": ".pt", ".metadata": ".pkl", ".distcp": ".pt"}  # that tell their format
_HERE = b"/the/folder/of/honest/files"  # written in the place of its path, for the time between


@cache
def valid_files(name: str) -> dict[str, bytes]:
    """Return the valid files of a format by path."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "x"
        folder.mkdir()
        FORMATS[name].write(folder)
        files = {
            str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), _HERE)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in (".lock", "lock.mdb")
        }
    return files


def damage(name: str, seed: int, number: int, folder: Path) -> None:
    """Write the files of a format into a new folder, damaged: a function of its arguments."""
    rng = Random(f"{name} {seed} {number}")
    form, files = FORMATS[name], dict(valid_files(name))
    folder.mkdir(parents=True)
    own = form.own is not None and (not form.damaged or rng.random() < 0.5)
    if not own:
        hit = [
            path
            for path in files
            if any(Path(path).match(each) or each == "**/*" for each in form.damaged)
        ]
        small = [path for path in hit if len(files[path]) < 100_000]
        chosen = rng.choice(small if small and rng.random() < 0.6 else hit)
        if rng.random() < 0.02:
            del files[chosen]
        else:
            others = [content for path, content in files.items() if path != chosen]
            suffix = _SUFFIXES.get(Path(chosen).suffix or Path(chosen).name, Path(chosen).suffix)
            files[chosen] = mutants.mutated(rng, files[chosen], suffix, others)
    _write_all(files, folder)
    if own and form.own is not None:
        form.own(rng, folder)


def write_valid(name: str, folder: Path) -> None:
    """Write the files of a format into a new folder, as they should be."""
    folder.mkdir(parents=True)
    _write_all(valid_files(name), folder)


def _write_all(files: dict[str, bytes], folder: Path) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content.replace(_HERE, str(folder).encode()))
