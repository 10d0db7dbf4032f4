"""``convert``: every format to every other, refusals, and full disks."""

import errno
import json
import os
import re
import shutil

import pytest
import torch
from conftest import GOLDEN, TINY, make_model

from cn_clip import convert as module
from cn_clip import weights
from cn_clip.cli import run
from cn_clip.convert import convert
from cn_clip.errors import CheckpointError, UsageError

SAVERS = {
    "official": weights.save_official,
    "hf": weights.save_hugging_face,
    "safetensors": weights.save_folder,
}


def path_for(folder, kind, name):
    return folder / (f"{name}.pt" if kind == "official" else name)


@pytest.mark.parametrize("to", SAVERS)
@pytest.mark.parametrize("source", SAVERS)
def test_every_format_converts_to_every_other(tiny_model, tmp_path, source, to):
    source_path, out = path_for(tmp_path, source, "source"), path_for(tmp_path, to, "out")
    SAVERS[source](tiny_model, source_path)
    done = convert(source_path, out, to)
    assert done.largest_difference == 0
    assert (done.kept, done.dropped, done.dtype) == (len(tiny_model.state_dict()), (), "float32")
    again = weights.build(weights.read(out)).state_dict()
    assert all(torch.equal(again[name], t) for name, t in tiny_model.state_dict().items())


def test_a_training_checkpoint_loses_its_optimizer_state_and_reports_it(tiny_model, tmp_path):
    state = {f"module.{name}": t for name, t in tiny_model.state_dict().items()}
    state["module.bert.pooler.dense.bias"] = torch.zeros(64)
    moments = {"state": {0: {"exp_avg": torch.zeros(3_000_000)}}}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": moments}, tmp_path / "epoch3.pt")
    done = convert(tmp_path / "epoch3.pt", tmp_path / "out", "safetensors")
    assert done.dropped == ("optimizer", "bert.pooler.dense.bias")
    assert done.size_after < done.size_before - 11_000_000


@pytest.mark.parametrize(("dtype", "most"), [("float16", 1e-2), ("bfloat16", 5e-2)])
def test_half_precision_is_half_the_size_and_close(tiny_model, tmp_path, dtype, most):
    weights.save_folder(tiny_model, tmp_path / "in")
    done = convert(tmp_path / "in", tmp_path / "out", "hf", dtype=dtype)
    assert 0 < done.largest_difference < most
    assert done.size_after < 0.6 * done.size_before
    kept = convert(tmp_path / "out", tmp_path / "back.pt", "official")
    assert (kept.dtype, kept.largest_difference) == (dtype, 0)
    wider = convert(tmp_path / "out", tmp_path / "wide.pt", "official", dtype="float32")
    assert (wider.dtype, wider.largest_difference) == ("float32", 0)
    other = "bfloat16" if dtype == "float16" else "float16"
    assert convert(tmp_path / "out", tmp_path / "other", "hf", dtype=other).dtype == other


def test_weights_in_mixed_precision_become_float32(tiny_model, tmp_path):
    tiny_model.bert.half()
    weights.save_folder(tiny_model, tmp_path / "in")
    assert convert(tmp_path / "in", tmp_path / "out", "safetensors").dtype == "float32"


def test_a_conversion_whose_embeddings_differ_is_not_written(tiny_model, tmp_path, monkeypatch):
    weights.save_folder(tiny_model, tmp_path / "in")
    other = make_model(TINY["vit"], seed=9)
    monkeypatch.setitem(
        module._WRITERS, "official", lambda _, path: weights.save_official(other, path)
    )
    with pytest.raises(CheckpointError, match="was not written: its embeddings would differ"):
        convert(tmp_path / "in", tmp_path / "out.pt", "official")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_existing_output_is_kept_without_overwrite(tiny_model, tmp_path):
    weights.save_folder(tiny_model, tmp_path / "in")
    (tmp_path / "out.pt").write_text("mine")
    with pytest.raises(UsageError, match="exists; give another place, or --overwrite"):
        convert(tmp_path / "in", tmp_path / "out.pt", "official")
    assert (tmp_path / "out.pt").read_text() == "mine"
    with pytest.raises(UsageError, match="was not written by `cn-clip convert`"):
        convert(tmp_path / "in", tmp_path / "out.pt", "official", overwrite=True)
    assert (tmp_path / "out.pt").read_text() == "mine"
    (tmp_path / "out.pt").unlink()
    for _ in range(2):
        convert(tmp_path / "in", tmp_path / "out.pt", "official", overwrite=True)
    with pytest.raises(UsageError, match="both input and output"):
        convert(tmp_path / "in", tmp_path / "in", "hf", overwrite=True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.doc").write_text("mine")
    with pytest.raises(UsageError, match=r"holds thesis\.doc, not written by convert"):
        convert(tmp_path / "in", tmp_path / "folder", "hf", overwrite=True)
    assert (tmp_path / "folder" / "thesis.doc").read_text() == "mine"


def test_an_unwritable_path_is_reported(tiny_model, tmp_path):
    weights.save_folder(tiny_model, tmp_path / "in")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"could not write .*nothing was changed"):
        convert(tmp_path / "in", tmp_path / "file" / "out.pt", "official")


def contents(path):
    inside = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(file): file.read_bytes() for file in inside}


def fsync_without_room(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# A full disk gives an error on write, or on flush where space is allocated late.
@pytest.mark.parametrize("moment", ["written", "flushed"])
@pytest.mark.parametrize("to", SAVERS)
def test_a_disk_that_fills_up_keeps_the_old_output(
    tiny_model, tmp_path, monkeypatch, capsys, request, to, moment
):
    source_path, out = tmp_path / "in", path_for(tmp_path, to, "out")
    weights.save_folder(tiny_model, source_path)
    weights.save_folder(make_model(TINY["vit"], seed=1), tmp_path / "other")
    convert(tmp_path / "other", out, to)
    shutil.rmtree(tmp_path / "other")
    before = contents(out)
    if moment == "written":
        request.getfixturevalue("full_disk")
    else:
        monkeypatch.setattr(os, "fsync", fsync_without_room)
    assert run(["convert", str(source_path), str(out), "--to", to, "--overwrite"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"cn-clip: could not write {out}: ")
    assert error.endswith("nothing was changed. Free some space or choose another path\n")
    assert error.count("\n") == 1
    assert re.search("File too large|No space left on device", error)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in", out.name])


def test_a_format_that_cannot_represent_the_model_is_refused(tmp_path, capsys):
    weights.save_folder(make_model(TINY["resnet"]), tmp_path / "in")
    assert run(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "hf"]) == 1
    assert "supports only ViT image towers, not resnet" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_conversion_restores_the_number_of_threads(tiny_model, tmp_path):
    weights.save_folder(tiny_model, tmp_path / "in")
    threads = torch.get_num_threads()
    convert(tmp_path / "in", tmp_path / "out", "hf")
    assert torch.get_num_threads() == threads


def test_the_command_line_reports_the_conversion(tiny_model, tmp_path, capsys):
    weights.save_folder(tiny_model, tmp_path / "in")
    source_path, out = str(tmp_path / "in"), str(tmp_path / "out.pt")
    assert run(["convert", source_path, out, "--to", "official"]) == 0
    assert "verified" in capsys.readouterr().out
    assert run(["convert", source_path, out, "--to", "official", "--overwrite", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["source_format"] == "safetensors folder"
    assert report["largest_difference"] == 0
    assert run(["convert", source_path, out, "--to", "official"]) == 2
    assert run(["convert", str(tmp_path / "no.pt"), str(tmp_path / "x"), "--to", "hf"]) == 1
    assert "no such file or folder" in capsys.readouterr().err


def test_an_openai_clip_is_refused(tmp_path, capsys):
    source_path = str(GOLDEN / "towers" / "openai_vit.pt")
    assert run(["convert", source_path, str(tmp_path / "out"), "--to", "hf"]) == 1
    assert "is not a Chinese-CLIP checkpoint" in capsys.readouterr().err


def test_the_number_of_threads_is_the_same_afterwards(tiny_checkpoint, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        convert(tiny_checkpoint, tmp_path / "out", "safetensors", dtype="float16")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
