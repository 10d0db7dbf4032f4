"""Plans and runs of tests: a tiny model, images, and what a finished output holds."""

import json
import sys
from pathlib import Path

import numpy as np
from conftest import make_image
from pyarrow import parquet

from cn_clip.bulk.engines.base import Task
from cn_clip.bulk.engines.local import LocalEngine
from cn_clip.bulk.planning import Request, make_plan
from cn_clip.bulk.run import run
from cn_clip.bulk.store import open_store
from cn_clip.cli.bulk_run import _planned_model
from cn_clip.cli.loading import Loading


def write_images(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        make_image(seed, (20, 16)).save(folder / f"{seed:04}.jpg")
    return folder


def request_of(model, *sources, shards_of=4, embed="images", stored="float32"):
    planned = _planned_model(Loading(model=str(model), device="cpu"))
    return Request(tuple(map(str, sources)), embed, stored, shards_of, planned)


def plan_in(out, model, *sources, **options):
    return make_plan(open_store(str(out)), request_of(model, *sources, **options))


def run_in(out, workers=0, **options):
    options = {"retries": 0} | options
    return run(open_store(str(out)), LocalEngine(workers), Task(str(out), **options))


def manifests_in(out):
    return {
        int(path.stem): json.loads(path.read_text())
        for path in sorted((Path(out) / "manifests").glob("*.json"))
    }


def rows_in(out, stem="img_emb"):
    """Return {id: vector} of all shards, after checking that no id is there twice."""
    rows = {}
    for path in sorted((Path(out) / stem).glob("*.npy")):
        number = path.stem.rpartition("_")[2]
        table = parquet.read_table(Path(out) / "metadata" / f"metadata_{number}.parquet")
        vectors, ids = np.load(path), table["id"].to_pylist()
        assert len(vectors) == len(ids)
        for id, vector in zip(ids, vectors, strict=True):
            assert id not in rows, id
            rows[id] = vector
    return rows


def quarantine_in(out):
    lines = []
    for path in sorted((Path(out) / "quarantine").glob("*.jsonl")):
        lines += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return lines


def command(*words):
    return [sys.executable, "-m", "cn_clip", "bulk", *map(str, words)]
