"""The state of a run on disk, when its files are damaged or somebody else's."""

import json
import os
import pickle
import warnings

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from cn_clip.errors import CheckpointError
from cn_clip.train.run.checkpoint import Progress, load_tensors, read_progress, save_state


class Odd:
    pass


def tensors(value=0.0):
    return {"model": {"a": torch.full((3, 4), value), "b": torch.full((2,), value)}, "heads": {}}


@pytest.fixture
def state(tmp_path):
    return save_state(tmp_path, Progress(total=3, before=0.5), tensors(1.0), keep=2)


class Runs:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_state_round_trips(state):
    found = tensors()
    load_tensors(state, found)
    assert all((each == 1).all() for each in found["model"].values())
    assert read_progress(state) == Progress(total=3, before=0.5)


def test_code_named_in_the_metadata_is_not_run(state, tmp_path):
    description = state / "tensors" / ".metadata"
    description.write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="names mkdir of"):
        load_tensors(state, tensors())
    assert not (tmp_path / "ran").exists()


def test_a_tensor_declared_as_an_object_is_not_unpickled(state):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells that there is one process
        save({"model": {"a": [Odd()]}}, checkpoint_id=state / "tensors", no_dist=True)
    with pytest.raises(CheckpointError, match="names BytesStorageMetadata of"):
        load_tensors(state, tensors())


def test_metadata_that_would_unpickle_forever_is_refused(state):
    doubling = b"".join(b"q%ch%c\x86" % (n, n) for n in range(1, 60))
    (state / "tensors" / ".metadata").write_bytes(b"\x80\x02})" + doubling + b"K\x01s.")
    with pytest.raises(CheckpointError, match="objects"):
        load_tensors(state, tensors())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stage", -1),
        ("step", "3"),
        ("before", "x"),
        ("weights", 1),
        ("evaluation_pending", 0),
        ("total", 2**80),
    ],
)
def test_progress_of_the_wrong_type_is_named(state, name, value):
    path = state / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(CheckpointError, match=f"damaged: {name} is"):
        read_progress(state)
