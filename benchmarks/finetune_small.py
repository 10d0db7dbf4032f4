"""What `cn-clip train --recipe finetune-small` gains on a few hundred pairs of one's own.

    python benchmarks/finetune_small.py --out DIR                  # both sets, three seeds each
    python benchmarks/finetune_small.py --out DIR --sets gcompris  # one set
    python benchmarks/finetune_small.py --out DIR --keep-data      # then: keep the other set, too
    python benchmarks/finetune_small.py --out DIR -- --epochs 3    # other options of the recipe

Two sets that `mini` was not trained on:

- stamps: the 468 things of things468.py, Debian's `tuxpaint-stamps-default`.
- gcompris: photos and drawings of Debian's `gcompris-qt-data`, with the captions of
  finetune_small.tsv, which were written for this benchmark while looking at the images.

Nothing is installed: the packages are looked for where Debian puts them, or give the folders into
which `dpkg -x` unpacked them with --stamps and --gcompris.

A seed splits a set into training, validation and test pairs: 300 / 80 / 88 of the stamps, and
64 / 17 / 19 % of gcompris. The score is the mean recall of the test pairs, before and after: recall
at 1, 5 and 10 in both directions. The interval (95 %) is that of the paired bootstrap over the
distinct test pairs of all seeds; a pair that several seeds test counts once, by its mean.

With --keep-data the weight of the mixture also heeds the other set's validation pairs, and the
score of its test pairs is printed. Runs that have ended are not trained again: only mixtures are
measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import struct
import subprocess
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from things468 import on_white, things

import cn_clip
from cn_clip.eval.metrics.bootstrap import paired_interval

CAPTIONS = Path(__file__).with_suffix(".tsv")
STAMPS = Path("/usr/share/tuxpaint/stamps")
GCOMPRIS = Path("/usr/share/gcompris-qt")
LONGEST = 512  # pixels of a written image's side
SPLIT = (300, 80, 88)  # of 468

Pairs = list[tuple[str, str]]  # file name, caption


def resources(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a Qt resource file (.rcc)."""
    raw = path.read_bytes()
    _, version, tree, data, names = struct.unpack(">4s4I", raw[:20])
    size = 22 if version > 1 else 14

    def walk(node: int, folder: str) -> Iterator[tuple[str, bytes]]:
        at = tree + node * size
        start, flags = struct.unpack(">IH", raw[at : at + 6])
        start += names
        length = struct.unpack(">H", raw[start : start + 2])[0] if node else 0
        name = folder + raw[start + 6 : start + 6 + 2 * length].decode("utf-16-be")
        if flags & 2:
            count, first = struct.unpack(">II", raw[at + 6 : at + 14])
            for child in range(first, first + count):
                yield from walk(child, f"{name}/" if node else "")
            return
        start = data + struct.unpack(">I", raw[at + 10 : at + 14])[0]
        length = struct.unpack(">I", raw[start : start + 4])[0]
        content = raw[start + 4 : start + 4 + length]
        yield name, zlib.decompress(content[4:]) if flags & 1 else content

    return walk(0, "")


def write_image(image: Image.Image, path: Path) -> None:
    image.thumbnail((LONGEST, LONGEST))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def stamps(folder: Path, out: Path) -> Pairs:
    """Write the 468 things on white into ``out``; return their names and captions."""
    pairs = []
    for path, caption in things(folder):
        name = "-".join(path.relative_to(folder).parts)
        if not (out / name).exists():
            write_image(on_white(path), out / name)
        pairs.append((name, caption))
    return pairs


def gcompris(folder: Path, out: Path) -> Pairs:
    """Write the captioned images of GCompris on white into ``out``, likewise."""
    with CAPTIONS.open(encoding="utf-8", newline="") as stream:
        captions = dict(csv.reader(stream, delimiter="\t"))
    wanted = {name.partition(":")[0] for name in captions}
    pairs = []
    for path in sorted(folder.rglob("*.rcc")):
        if path.name not in wanted:
            continue
        for name, content in sorted(resources(path)):
            caption = captions.get(f"{path.name}:{name}")
            if caption is None:
                continue
            file = f"{path.stem}-{name.replace('/', '-')}.png"
            if not (out / file).exists():
                source = out / "source"
                source.parent.mkdir(parents=True, exist_ok=True)
                source.write_bytes(content)
                write_image(on_white(source), out / file)
                source.unlink()
            pairs.append((file, caption))
    if len(pairs) != len(captions):
        sys.exit(f"{len(captions) - len(pairs)} of the images in {CAPTIONS} are not in {folder}")
    return pairs


def split(pairs: Pairs, seed: int, out: Path) -> dict[str, Pairs]:
    """Split pairs by a seed, and write a CSV of each part beside the images."""
    order = np.random.default_rng(seed).permutation(len(pairs))
    sizes = [round(len(pairs) * each / sum(SPLIT)) for each in SPLIT]
    parts = np.split(order, np.cumsum(sizes)[:2])
    found = {}
    for name, numbers in zip(("train", "val", "test"), parts, strict=True):
        found[name] = [pairs[n] for n in numbers]
        write_csv(found[name], out / f"{name}-{seed}.csv")
    return found


def write_csv(pairs: Pairs, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("image", "text"), *pairs])


def recalls(model: str, pairs: Pairs, folder: Path) -> np.ndarray:
    """Recall of each pair, in %: at 1, 5 and 10, of its image and of its caption, averaged."""
    embedder = cn_clip.load(model, device="cpu")
    texts = list(dict.fromkeys(caption for _, caption in pairs))
    own = np.array([texts.index(caption) for _, caption in pairs])
    images = embedder.embed_images([folder / name for name, _ in pairs])
    scores = embedder.embed_texts(texts) @ images.T  # (texts, images)
    correct = np.arange(len(texts))[:, None] == own
    by_image = hits(scores.T, correct.T)
    return (by_image + hits(scores, correct)[own]) / 2


def hits(scores: np.ndarray, correct: np.ndarray) -> np.ndarray:
    order = np.argsort(-scores, axis=1, kind="stable")
    right = np.take_along_axis(correct, order, axis=1)
    return np.mean([100.0 * right[:, :k].any(axis=1) for k in (1, 5, 10)], axis=0)


def pooled(rows: list[tuple[Pairs, np.ndarray, np.ndarray]]) -> tuple[float, float, float]:
    """The mean gain over the distinct pairs of several seeds, and its interval."""
    seen = defaultdict(list)
    for pairs, before, after in rows:
        for (name, _), *values in zip(pairs, before, after, strict=True):
            seen[name].append(values)
    before, after = np.array([np.mean(values, axis=0) for values in seen.values()]).T
    found = paired_interval(after, before)
    return found.value, found.low, found.high


def train(name: str, seed: int, out: Path, other: str | None, flags: list[str]) -> dict:
    """Run the recipe, or go on with its run; return the outcome."""
    run, data = out / f"run-{name}-{seed}", out / name
    command = [sys.executable, "-m", "cn_clip", "train", "--recipe", "finetune-small"]
    command += ["--train-data", f"csv:{data / f'train-{seed}.csv'}"]
    command += ["--val-data", f"csv:{data / f'val-{seed}.csv'}"]
    if other is not None:
        command += ["--keep-data", f"csv:{out / other / f'val-{seed}.csv'}", "--allow-changes"]
    command += ["--output.folder", str(run), "--resume", "auto", "--seed", str(seed), *flags]
    print(f"$ cn-clip {shlex.join(command[3:])}", flush=True)
    with (out / f"run-{name}-{seed}.log").open("a") as log:
        subprocess.run(command, check=True, stdout=log)
    return json.loads((run / "outcome.json").read_text("utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for images and runs")
    parser.add_argument("--stamps", type=Path, default=STAMPS)
    parser.add_argument("--gcompris", type=Path, default=GCOMPRIS)
    parser.add_argument("--sets", nargs="+", default=["stamps", "gcompris"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep-data", action="store_true", help="keep the other set's score")
    parser.add_argument("flags", nargs="*", help="other options of the recipe, after --")
    options = parser.parse_args()
    kinds = {"stamps": (stamps, options.stamps), "gcompris": (gcompris, options.gcompris)}
    pairs = {}
    for name in kinds if options.keep_data else options.sets:
        make, source = kinds[name]
        pairs[name] = make(source, options.out / name)
        if not pairs[name]:
            parser.error(f"no captioned images in {source}")
    for name in options.sets:
        other = next(each for each in kinds if each != name) if options.keep_data else None
        rows, kept = [], []
        for seed in options.seeds:
            parts = {each: split(pairs[each], seed, options.out / each) for each in pairs}
            outcome = train(name, seed, options.out, other, options.flags)
            models = "mini", outcome["weights"]
            test = parts[name]["test"]
            rows.append((test, *(recalls(m, test, options.out / name) for m in models)))
            weight = "".join(f" (mixture {each['weight']:g})" for each in outcome["mixtures"])
            print(
                f"{name} seed {seed}: validation {100 * outcome['scores'][0][1]:.1f} -> "
                f"{100 * outcome['scores'][-1][1]:.1f}{weight}; test {rows[-1][1].mean():.1f} -> "
                f"{rows[-1][2].mean():.1f} ({len(test)} pairs)",
                flush=True,
            )
            if other is not None:
                test = parts[other]["test"]
                kept.append((test, *(recalls(m, test, options.out / other) for m in models)))
                print(f"  kept {other}: {kept[-1][1].mean():.1f} -> {kept[-1][2].mean():.1f}")
        print_gain(f"{name}: gain", rows)
        if kept:
            print_gain(f"{name}: kept {other}", kept)


def print_gain(what: str, rows: list[tuple[Pairs, np.ndarray, np.ndarray]]) -> None:
    mean = np.mean([after.mean() - before.mean() for _, before, after in rows])
    value, low, high = pooled(rows)
    print(
        f"{what} {mean:+.1f} points of mean recall over seeds; {value:+.1f} [{low:+.1f}, ", end=""
    )
    print(f"{high:+.1f}] over distinct pairs")


if __name__ == "__main__":
    main()
