"""The page about a run: it needs nothing beside it, and shows what was measured."""

import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from data.formats import jpeg
from train.runs import make_recipe

from cn_clip.data.sources.open import open_mix
from cn_clip.eval.dataset import eval_set_of
from cn_clip.train.run.events import MixtureScore, MixturesEvent, StepEvent, parse
from cn_clip.train.run.log import Log, read_events
from cn_clip.train.run.report import curve, headline, mixtures, write_report

RECALLS = {f"{way}_r{k}": 0.125 for way in ("t2i", "i2t") for k in (1, 5, 10)}


class Page(HTMLParser):
    """Addresses, tags and texts of a page; every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.tags, self.texts, self.open = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [v for name, v in attributes if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def scored(stage, total, recall):
    earlier = {"before": None, "best": None}
    values = {"stage": stage, "step": total, "mean_recall": recall} | earlier | RECALLS
    return ("score", total, values)


STAGE = {
    "number": 0, "step": 0, "steps": 8, "lr": 1e-4, "warmup": 1, "batch": 16, "trainable": 9,
    "batch_norm": None,
}  # fmt: skip
STEP = {
    "step": 1, "loss": 4.0, "lr": 1e-4, "logit_scale": 14.3, "pairs_per_second": 9.0,
    "skipped": 0, "gradient_norm": 1.0,
}  # fmt: skip
EVENTS = [
    (
        "start",
        0,
        {"recipe": "r", "model": "tiny<vit>", "parameters": 1_500_000, "pairs": 48, "device": "cpu",
         "processes": 1, "origins": ["visual.* from <clip>.pt"]},
    ),
    ("warning", 0, {"text": "3 validation pairs are in the training data & more"}),
    ("stage", 0, {"stage": "locked", **STAGE}),
    scored("locked", 0, 0.125),
    *(
        ("step", n, {"stage": "locked", "mean_loss": 4 - n / 10, **STEP})
        for n in range(1, 9)
    ),
    scored("locked", 8, 0.333),
    ("stage", 8, {"stage": "unlocked", **STAGE}),
    ("step", 9, {"stage": "unlocked", "mean_loss": "nan", **STEP}),
    scored("unlocked", 12, 0.25),
    scored("final", 12, 0.375),
    ("end", 12, {"seconds": 90.0, "weights": "final"}),
]  # fmt: skip


@pytest.fixture
def run(pairs, start, tmp_path):
    """The folder of a run of two stages, its recipe and its validation pairs."""
    stages = [{"name": "locked"}, {"name": "unlocked"}]
    recipe = make_recipe(pairs, start, tmp_path / "run", *stages, name="<two> stages")
    folder = tmp_path / "run"
    log = Log(folder, recipe, on_event=lambda event: None, writes=True)
    for kind, total, values in EVENTS:
        log.write(kind, total, **values)
    log.close()
    validation = eval_set_of(open_mix(recipe.data.val))
    rng = np.random.default_rng(0)
    for when in ("before", "after"):
        made = {n: rng.normal(size=(16, 8)).astype(np.float16) for n in ("images", "texts")}
        np.savez(folder / f"{when}.npz", **made)
    return folder, recipe, validation


def read_page(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_is_self_contained(run):
    write_report(*run)
    text, page = read_page(run[0])
    assert page.addresses and all(each.startswith("data:image/") for each in page.addresses)
    assert not re.search(r"https?://|url\(|@import", text)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)


def test_the_page_shows_stages_scores_curves_and_origins_of_weights(run):
    write_report(*run)
    text, page = read_page(run[0])
    shown = " ".join(page.texts)
    for each in (
        "<two> stages",
        "locked",
        "unlocked",
        "before",
        "final",
        "tiny<vit>",
        "1.5 minutes",
    ):
        assert each in shown
    for score in ("12.5", "33.3", "37.5", "+20.8", "+25.0"):
        assert score in shown
    assert "visual.* from <clip>.pt" in page.texts
    assert "3 validation pairs are in the training data & more" in page.texts
    assert "global_batch_size = 16" in shown
    assert page.tags.count("svg") == 4 and page.tags.count("polyline") == 4
    assert "nan" not in text


def test_the_page_shows_retrieved_images_before_and_after(run):
    folder, _, validation = run
    images = np.eye(16, dtype=np.float16)
    np.savez(folder / "after.npz", images=images, texts=images)
    write_report(*run)
    _, page = read_page(folder)
    assert page.tags.count("img") == 8 * 2 * 5
    shown = [text for text in page.texts if text in validation.texts]
    assert len(shown) == 8 and shown[0] == validation.texts[0] and shown[-1] == validation.texts[-1]
    assert page.texts.count("1.000 ✓") == 8  # after: each text finds its own


class OneWhole:
    """A source of which the first picture alone can be read."""

    def image(self, index):
        return b"broken" if index else jpeg(1)


def test_an_unreadable_image_is_left_out_of_the_page(run):
    folder, recipe, validation = run
    images = np.linspace(1, 0.5, 16, dtype=np.float16)[:, None]  # the first is best for any text
    for when in ("before", "after"):
        np.savez(folder / f"{when}.npz", images=images, texts=np.ones((16, 1), np.float16))
    validation.sources[0] = OneWhole()
    write_report(folder, recipe, validation)
    assert read_page(folder)[1].tags.count("img") == 8 * 2


def test_a_run_without_validation_says_so(run):
    folder, recipe, _ = run
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "log.jsonl").write_text("\n".join(x for x in lines if '"score"' not in x) + "\n")
    for when in ("before", "after"):
        (folder / f"{when}.npz").unlink()
    assert write_report(folder, recipe, None) == []
    _, page = read_page(folder)
    assert "No validation pairs." in page.texts and "img" not in page.tags


def test_the_headline_is_before_the_best_of_each_stage_and_the_final_score(run):
    assert write_report(*run) == [
        ("before", 0.125),
        ("locked", 0.333),
        ("unlocked", 0.333),  # it went on from the best weights, and found none better
        ("final", 0.375),
    ]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([], []),
        ([("locked", 0, 0.5)], [("before", 0.5)]),
        ([("locked", 0, 0.5), ("locked", 5, 0.25)], [("before", 0.5), ("locked", 0.5)]),
        (
            [("locked", 0, 0.1), ("locked", 5, 0.4), ("locked", 9, 0.3), ("unlocked", 12, 0.6)],
            [("before", 0.1), ("locked", 0.4), ("unlocked", 0.6)],
        ),
        (  # the mixture is what the next stage begins with, better or not
            [("locked", 0, 0.1), ("locked", 5, 0.4), ("locked, mixed", 5, 0.2),
             ("unlocked", 9, 0.3)],
            [("before", 0.1), ("locked", 0.4), ("locked, mixed", 0.2), ("unlocked", 0.3)],
        ),
    ],
)  # fmt: skip
def test_the_headline_of_an_unfinished_run(run, scores, expected):
    events = parse(
        {"kind": kind, "total": total, **values}
        for kind, total, values in (scored(*score) for score in scores)
    )
    assert headline(events, run[1]) == expected


def points_of(svg):
    (line,) = re.findall(r'<polyline points="([^"]*)"', svg)
    return [tuple(map(float, point.split(","))) for point in line.split()]


def test_a_curve_keeps_order_and_proportion():
    drawn = points_of(curve([(0, 1.0), (50, 3.0), (100, 2.0)], [], "loss"))
    (x0, y0), (x1, y1), (x2, y2) = drawn
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 > y2 > y1  # down is more in an SVG
    assert y0 - y2 == pytest.approx(y2 - y1, abs=0.2)


def test_a_curve_marks_where_stages_begin():
    svg = curve([(0, 1.0), (100, 2.0)], [(0, "one"), (50, "a<b")], "loss")
    assert "one</text>" in svg and "a&lt;b</text>" in svg


@pytest.mark.parametrize("points", [[(1, 2.0)], [(0, 1.0), (5, 1.0)], [(0, "nan"), (3, 1.0)]])
def test_a_curve_of_one_point_or_one_value_is_finite(points):
    assert all(np.isfinite(each) for point in points_of(curve(points, [], "x")) for each in point)


def test_a_long_curve_is_thinned_and_an_empty_one_says_so():
    drawn = points_of(curve([(n, float(n)) for n in range(10_000)], [], "x"))
    assert 300 <= len(drawn) <= 1200
    assert curve([], [], "x") == "<p>none</p>"


ROW = {"weight": 0.5, "score": 0.25, "loss": 1.5, "kept": None}
SWEEP = {"stage": "train", "weight": 0.5, "within": True, "mixtures": [ROW, ROW]}


@pytest.mark.parametrize(
    "damage",
    [
        {"mixtures": []},
        {"mixtures": 5},
        {"mixtures": [1]},
        {"mixtures": [ROW, {**ROW, "kept": 0.5}]},
        {"mixtures": [{"weight": 0.5, "score": 0.25, "loss": 1.5}]},
        {"mixtures": [{**ROW, "score": "0.25"}]},
        {"weight": None},
        {"within": 1},
        {"stage": []},
    ],
)
def test_a_damaged_line_of_mixtures_is_left_out(damage):
    event = {"kind": "mixtures", "total": 8} | SWEEP
    assert [e.values() for e in mixtures(parse([event, event | damage]))] == [SWEEP]


def test_typed_events_survive_the_log(run, tmp_path):
    (tmp_path / "again").mkdir()
    log = Log(tmp_path / "again", run[1], on_event=lambda event: None, writes=True)
    events = read_events(run[0])
    events.append(StepEvent(13, "s", 1, 4.0, math.inf, 1e-4, 14.3, 9.0, 0, 1.0, memory_mb=7))
    events.append(MixturesEvent(13, "s", 0.5, True, [MixtureScore(0.5, 0.25, 1.5, None)]))
    for event in events:
        log.record(event)
    log.close()
    assert len(events) == len(EVENTS) + 2
    assert repr(read_events(tmp_path / "again")) == repr(events)  # NaN equals NaN in the text


@pytest.mark.parametrize(
    "damage",
    [{"kind": 3}, {"kind": "tick"}, {"total": True}, {"loss": "4"}, {"loss": 1e99}, {"step": 1.5},
     {"stage": None}, {"lr": None}],
)  # fmt: skip
def test_a_damaged_line_of_a_step_is_left_out(damage):
    line = {"kind": "step", "total": 3, "stage": "s", "mean_loss": 1.0, **STEP}
    assert len(parse([line])) == 1 and parse([line | damage]) == []


def test_the_names_in_logs_of_old_runs_are_read():
    line = {"kind": "step", "total": 3, "stage": "s", "mean_loss": 1.0, **STEP}
    old = {"rate" if name == "lr" else name: value for name, value in line.items()}
    assert parse([old]) == parse([line])
    line = {"kind": "stage", "total": 3, "stage": "s", **STAGE}
    renamed = {"lr": "rate", "trainable": "learns"}
    old = {renamed.get(name, name): value for name, value in line.items()}
    assert parse([old]) == parse([line])
