"""The log of a run: what is written is read again, also after it was killed and resumed."""

import json
import sys

import pytest

from cn_clip.errors import UsageError
from cn_clip.train.recipe.schema import Output, Recipe
from cn_clip.train.run.log import Log, read_log


def opened(folder, on_event=lambda event: None, writes=True, **output):
    return Log(folder, Recipe(output=Output(**output)), on_event=on_event, writes=writes)


def written(folder, *events):
    log = opened(folder)
    for kind, total, values in events:
        log.write(kind, total, **values)
    log.close()
    return read_log(folder)


def without_time(events):
    return [{key: value for key, value in event.items() if key != "time"} for event in events]


def test_written_events_reach_the_callback_and_are_read_again(tmp_path):
    told = []
    log = opened(tmp_path / "new" / "run", told.append)
    log.write("start", 0, origins=["bert.* 来自 roberta.bin"], pairs=3)
    log.write("step", 1, stage="一", loss=0.5)
    log.close()
    assert read_log(tmp_path / "new" / "run") == told
    assert without_time(told) == [
        {"kind": "start", "total": 0, "origins": ["bert.* 来自 roberta.bin"], "pairs": 3},
        {"kind": "step", "total": 1, "stage": "一", "loss": 0.5},
    ]
    text = (tmp_path / "new" / "run" / "log.jsonl").read_text(encoding="utf-8")
    assert "来自" in text and len(text.splitlines()) == 2


def test_every_line_is_flushed(tmp_path):
    """A run that is killed has told what it had done."""
    log = opened(tmp_path)
    log.write("step", 1, loss=0.5)
    assert len(read_log(tmp_path)) == 1
    log.close()


def test_the_later_of_two_lines_for_one_step_counts(tmp_path):
    step = {"stage": "one", "loss": 1.0}
    written(tmp_path, ("step", 1, step), ("step", 2, step), ("score", 2, step))
    events = written(tmp_path, ("step", 2, step | {"loss": 2.0}), ("step", 3, step))
    assert [(e["kind"], e["total"], e["loss"]) for e in events] == [
        ("step", 1, 1.0),
        ("step", 2, 2.0),
        ("score", 2, 1.0),
        ("step", 3, 1.0),
    ]


def test_scores_of_two_stages_at_one_step_are_both_kept(tmp_path):
    events = written(tmp_path, ("score", 5, {"stage": "one"}), ("score", 5, {"stage": "final"}))
    assert [event["stage"] for event in events] == ["one", "final"]


@pytest.mark.parametrize(
    "half",
    [b'{"kind": "step", "tot', '{"kind": "step", "stage": "猫'.encode()[:-1], b"[1]\n", b"{}\n"],
)
def test_an_incomplete_last_line_is_ignored_and_the_next_run_starts_a_new_line(tmp_path, half):
    written(tmp_path, ("step", 1, {"loss": 1.0}))
    with (tmp_path / "log.jsonl").open("ab") as stream:
        stream.write(half)
    assert [event["total"] for event in read_log(tmp_path)] == [1]
    events = written(tmp_path, ("resumed", 1, {}), ("step", 2, {"loss": 0.5}))
    assert [(e["kind"], e["total"]) for e in events] == [("step", 1), ("resumed", 1), ("step", 2)]


def test_a_folder_without_a_log_has_no_events(tmp_path):
    assert read_log(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_written_as_valid_json(tmp_path, value):
    written(tmp_path, ("step", 1, {"loss": value, "more": {"norm": value}}))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"] == line["more"]["norm"] == str(value)


def test_ticks_reach_the_callback_and_not_the_file(tmp_path):
    told = []
    log = opened(tmp_path, told.append)
    log.tick("computing", 3, 9)
    log.close()
    assert told == [{"kind": "tick", "what": "computing", "done": 3, "of": 9}]
    assert read_log(tmp_path) == []


def test_only_the_main_process_logs(tmp_path):
    told = []
    log = opened(tmp_path / "run", told.append, writes=False, tensorboard=True)
    log.write("step", 1, loss=0.5)
    log.tick("computing", 1, 2)
    log.close()
    assert told == [] and not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard itself
def test_tensorboard_has_every_number_once_the_log_is_closed(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = opened(tmp_path, tensorboard=True)
    log.write("step", 1, stage="one", loss=0.5, resumed=True)
    log.write("step", 2, stage="one", loss=0.25)
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Tags()["scalars"] == ["step/loss"]
    assert [(e.step, e.value) for e in board.Scalars("step/loss")] == [(1, 0.5), (2, 0.25)]


def test_tensorboard_files_are_written_only_on_request(tmp_path):
    written(tmp_path, ("step", 1, {"loss": 0.5}))
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("name", ["tensorboard", "swanlab", "wandb"])
def test_a_missing_library_is_named_with_its_install_command(tmp_path, monkeypatch, name):
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=f"output.{name} needs {name}: pip install {name}, or"):
        opened(tmp_path, **{name: True})


@pytest.mark.parametrize("name", ["swanlab", "wandb"])
def test_other_boards_get_every_number(tmp_path, monkeypatch, name):
    from types import SimpleNamespace

    logged = []
    board = SimpleNamespace(
        init=lambda **options: logged.append(options["project"]),
        log=lambda values, step: logged.append((values, step)),
    )
    monkeypatch.setitem(sys.modules, name, board)
    log = opened(tmp_path, **{name: True})
    log.write("step", 3, stage="one", loss=0.5)
    log.close()
    assert logged == ["cn-clip", ({"step/loss": 0.5}, 3)]
