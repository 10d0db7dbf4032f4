"""Format versions: files of older, current and newer versions, of every format."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from data.formats import write_csv

import cn_clip
from cn_clip import weights
from cn_clip.calibration import Calibration, Logistic, read_calibration, write_calibration
from cn_clip.cli.show import print_json
from cn_clip.data.curate.decontaminate import (
    DecontaminationResult,
    claim_removed,
    read_removed,
    write_removed,
)
from cn_clip.data.loading.loader import Preparation
from cn_clip.data.sources.open import open_mix, open_source
from cn_clip.embeddings.extract import extract
from cn_clip.embeddings.files import (
    EmbeddingsToWrite,
    claim_embeddings,
    read_embeddings,
    writer_for,
)
from cn_clip.embeddings.inputs import read_texts
from cn_clip.errors import CheckpointError, DataError, UsageError
from cn_clip.format_version import Format
from cn_clip.train.batches.feature_cache import FEATURES, cache_image_features
from cn_clip.train.early_stopping import EarlyStopping
from cn_clip.train.run.checkpoint import Progress, read_progress, save_state

CALIBRATION = Calibration(
    "tiny", "f", Logistic(20.0, -4.0), 0.1, 0.9, {"search": 0.3, "labels": None},
    {"images": 4, "texts": 4, "pairs": 4, "non_pairs": 12}, "d", "2025-01-31",
)  # fmt: skip
NEWER = "of a newer cn_clip; update cn_clip"


def change(path, drop=(), **values):
    """Change fields of a JSON file; ``drop`` removes some."""
    stored = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps(stored | values, indent=2))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("cn-clip thing 4", NEWER),
        ("cn-clip thing 2", "not 'cn-clip thing 3'; make it again"),
        ("cn-clip other 9", "not 'cn-clip thing 3'; make it again"),
        ("cn-clip thing 99999999999", "not 'cn-clip thing 3'; make it again"),
        (3, "not 'cn-clip thing 3'; make it again"),
    ],
)
def test_another_format_or_a_newer_version_is_refused(value, message):
    with pytest.raises(DataError, match=rf"x\.json: its format is .*{message}"):
        Format("thing", 3).check(value, "x.json", DataError, "make it again")


def test_the_current_version_and_none_are_accepted():
    for value in ("cn-clip thing 3", None):
        Format("thing", 3).check(value, "x.json", DataError, "make it again")


def test_json_output_has_its_version_first(capsys):
    print_json({"labels": ["猫"]})
    assert list(json.loads(capsys.readouterr().out).items()) == [
        ("format", "cn-clip json 1"),
        ("labels", ["猫"]),
    ]


@pytest.fixture
def state(tmp_path):
    progress = Progress(
        total=3, early_stopping=EarlyStopping(best=0.5, waited=1), evaluation_pending=True
    )
    return save_state(tmp_path, progress, {"model": {"w": torch.ones(2)}}, keep=1), progress


def test_the_state_of_an_old_run_is_read_with_its_old_names(state):
    folder, progress = state
    assert read_progress(folder) == progress
    change(
        folder / "progress.json",
        drop=("format", "early_stopping", "evaluation_pending"),
        course=asdict(progress.early_stopping),
        due=True,
    )
    assert read_progress(folder) == progress


def test_the_state_of_a_newer_run_is_refused(state):
    change(state[0] / "progress.json", format="cn-clip run state 2", new_field=1)
    with pytest.raises(CheckpointError, match=rf"progress\.json: .* 2', {NEWER}"):
        read_progress(state[0])


def test_a_newer_calibration_is_refused_and_may_be_replaced(tmp_path):
    path = tmp_path / "c.json"
    write_calibration(CALIBRATION, path)
    assert read_calibration(path) == CALIBRATION
    change(path, format="cn-clip calibration 2", new_field=1)
    with pytest.raises(UsageError, match=rf"c\.json: .* 2', {NEWER}"):
        read_calibration(path)
    change(path, drop=("format",))  # all calibrations have had this field
    with pytest.raises(UsageError, match="has no 'format'"):
        read_calibration(path)


def cache(pictures, folder):
    return cache_image_features(
        open_mix([write_csv(pictures)]),
        lambda pixels: pixels.float().mean((2, 3)),
        {"tower": "this"},
        Preparation(resolution=32),
        folder,
        workers=0,
    )


def test_an_old_feature_cache_is_read_and_a_newer_one_refused(pictures, tmp_path):
    about = tmp_path / "cache" / "about.json"
    cache(pictures, tmp_path / "cache")
    shard = tmp_path / "cache" / "features-00000.npy"
    written = shard.stat().st_mtime_ns
    images = json.loads(about.read_text())["images"]
    change(about, drop=("format", "images"), pictures=images)
    assert FEATURES(tmp_path / "cache") is None
    cache(pictures, tmp_path / "cache")
    assert shard.stat().st_mtime_ns == written  # it was used
    change(about, pictures="another")
    with pytest.raises(UsageError, match="of another images; delete"):
        cache(pictures, tmp_path / "cache")
    change(about, format="cn-clip feature cache 2")
    with pytest.raises(UsageError, match=rf"about\.json: .* 2', {NEWER}"):
        cache(pictures, tmp_path / "cache")


def change_about(out, drop=(), **values):
    """Change the metadata of embeddings."""
    if out.suffix == ".npz":
        with np.load(out) as arrays:
            stored = dict(arrays)
        about = json.loads(str(stored["about"]))
        about = {k: v for k, v in about.items() if k not in drop} | values
        np.savez(out, **stored | {"about": np.array(json.dumps(about))})
    else:
        path = out / "about.json" if out.is_dir() else out.with_name(f"{out.name}.about.json")
        change(path, drop, **values)


@pytest.mark.parametrize("name", ["x.npz", "x.jsonl", "x"])
def test_old_embeddings_are_read_and_newer_ones_refused(tmp_path, name):
    out = tmp_path / name
    rows = np.eye(3, 4, dtype=np.float32)
    about = {"model": "tiny", "kind": "texts", "dim": 4}
    embeddings = EmbeddingsToWrite(
        "texts", ["a", "b", "c"], ["一", "二", "三"], 4, lambda i, j: rows[i:j], about
    )
    writer_for(out)(embeddings, out)
    for drop in ((), ("format",)):
        change_about(out, drop)
        np.testing.assert_array_equal(read_embeddings(out, "texts").vectors, rows)
    change_about(out, format="cn-clip embeddings 2")
    with pytest.raises(DataError, match=f" 2', {NEWER}"):
        read_embeddings(out, "texts")
    claim_embeddings(out, overwrite=True)


class Interrupted(Exception):
    pass


def test_old_parts_of_embeddings_are_reused_and_newer_ones_refused(
    tiny_model, tmp_path, monkeypatch
):
    weights.save_folder(tiny_model, tmp_path / "model")
    embedder = cn_clip.load(tmp_path / "model", device="cpu")
    (tmp_path / "t.txt").write_text("\n".join("甲乙丙丁戊"), encoding="utf-8")
    out, about = tmp_path / "x.npz", tmp_path / "x.npz.parts" / "about.json"
    monkeypatch.setattr("cn_clip.embeddings.extract._PER_PART", {"texts": 2})

    def interrupt(done, total):
        if done == 4:
            raise Interrupted

    def run(**options):
        return extract(embedder, "texts", read_texts([str(tmp_path / "t.txt")]), out, **options)

    with pytest.raises(Interrupted):
        run(on_progress=interrupt)
    change(about, format="cn-clip embeddings 2")
    with pytest.raises(UsageError, match=NEWER):
        run()
    change(about, drop=("format",))
    assert run().resumed == 2


def test_an_old_list_of_removed_pairs_is_read_and_a_newer_one_refused(pictures, tmp_path):
    source, out = open_source(write_csv(pictures)), tmp_path / "removed.jsonl"
    result = DecontaminationResult(source.name, "test", len(source))
    write_removed(result, source, source, out)
    current = out.read_text(encoding="utf-8")
    assert current.startswith('{"format": "cn-clip data decontaminate 1", ')
    for lines in (current, current.replace('"format": "cn-clip data decontaminate 1", ', "")):
        out.write_text(lines, encoding="utf-8")
        assert read_removed(out, source).tolist() == []
    out.write_text(current.replace("nate 1", "nate 2"), encoding="utf-8")
    with pytest.raises(DataError, match=NEWER):
        read_removed(out, source)
    claim_removed(out, overwrite=True)
