"""A run's folder: one process trains in it, by one recipe, until it has ended."""

import subprocess
import sys

import pytest
from train.runs import from_toml, make_recipe

from cn_clip.errors import UsageError
from cn_clip.train.run.checkpoint import Progress, save_state
from cn_clip.train.run.run_dir import Outcome, lock_folder, prepare_folder, write_outcome


@pytest.fixture
def recipes(pairs, start, tmp_path):
    """The recipe of a run, and the same with another seed and learning rate."""
    stage = {"optimizer": {"learning_rate": 2e-3, "warmup": 2}}
    old = make_recipe(pairs, start, tmp_path / "run")
    return old, make_recipe(pairs, start, tmp_path / "run", stage, seed=7)


@pytest.fixture
def begun(recipes, tmp_path):
    """The folder of a run that has saved a state."""
    assert prepare_folder(tmp_path / "run", recipes[0], False, False) is None
    save_state(tmp_path / "run", Progress(total=3), {}, keep=1)
    return tmp_path / "run"


def recipe_in(folder):
    return from_toml((folder / "recipe.toml").read_text(encoding="utf-8"))


def outcome_of(folder):
    scores = [("before", 0.25), ("final", 0.5)]
    mixtures = [{"stage": "train", "weight": 0.5, "within": True, "mixtures": [{"weight": 0.5}]}]
    return Outcome(str(folder), str(folder / "final"), 12, 1.5, scores, mixtures)


def test_the_complete_recipe_is_written_to_the_folder(recipes, begun):
    assert recipe_in(begun) == recipes[0]


HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_while_another_trains(tmp_path):
    folder = tmp_path / "run"
    with lock_folder(folder):
        pass
    (lock,) = folder.iterdir()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=r"another process is training in .*run; wait"):
            lock_folder(folder)
        other.stdin.close()
        other.wait(10)
    with lock_folder(folder):
        pass


def test_the_lock_is_released_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), lock_folder(tmp_path):
        raise RuntimeError("it ended")
    with lock_folder(tmp_path):
        pass


def test_a_run_is_resumed_only_on_request(recipes, begun):
    with pytest.raises(UsageError, match=r"has a run; resume it with --resume auto, or give"):
        prepare_folder(begun, recipes[0], False, False)
    assert prepare_folder(begun, recipes[0], True, False) is None


def test_resume_in_a_new_folder_starts_a_run(recipes, tmp_path):
    assert prepare_folder(tmp_path / "run", recipes[0], True, False) is None
    assert recipe_in(tmp_path / "run") == recipes[0]


def test_a_folder_without_a_state_starts_again_with_any_recipe(recipes, tmp_path):
    """It was killed before its first state: there is nothing to go on from."""
    assert prepare_folder(tmp_path / "run", recipes[0], False, False) is None
    assert prepare_folder(tmp_path / "run", recipes[1], False, False) is None
    assert recipe_in(tmp_path / "run") == recipes[1]


def test_a_changed_recipe_is_shown_and_refused_unless_allowed(recipes, begun):
    with pytest.raises(UsageError) as caught:
        prepare_folder(begun, recipes[1], True, False)
    said = str(caught.value)
    assert "seed: 0, now 7; stages.train.optimizer.learning_rate: 0.001, now 0.002." in said
    assert said.endswith("--allow-changes resumes it with the new recipe")
    assert recipe_in(begun) == recipes[0]
    assert prepare_folder(begun, recipes[1], True, True) is None
    assert recipe_in(begun) == recipes[1]


def test_a_run_that_has_ended_gives_its_outcome_and_trains_no_more(recipes, begun):
    write_outcome(begun, outcome_of(begun))
    assert prepare_folder(begun, recipes[0], True, False) == outcome_of(begun)
    with pytest.raises(UsageError, match="has a run"):
        prepare_folder(begun, recipes[0], False, False)


def test_a_finished_run_resumes_with_a_changed_recipe_and_is_then_unfinished(recipes, begun):
    """Killed before it ends again, it must not be taken for the run that had ended."""
    write_outcome(begun, outcome_of(begun))
    assert prepare_folder(begun, recipes[1], True, True) is None
    assert prepare_folder(begun, recipes[1], True, False) is None


@pytest.mark.parametrize("place", ["file", "file/run", "x" * 300])
def test_a_path_that_cannot_be_a_folder_is_named(tmp_path, place):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match=r"output\.folder is .*give another --output\.folder"):
        lock_folder(tmp_path / place)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_run_with_a_damaged_outcome_resumes(recipes, begun):
    write_outcome(begun, outcome_of(begun))
    (begun / "outcome.json").write_text('{"scores": [1]', encoding="utf-8")
    assert prepare_folder(begun, recipes[0], True, False) is None


def test_a_damaged_recipe_in_the_folder_is_named(recipes, begun):
    (begun / "recipe.toml").write_bytes(b"seed = \xff")
    with pytest.raises(UsageError, match=r"recipe\.toml cannot be read: byte 7 is not UTF-8"):
        prepare_folder(begun, recipes[0], True, False)


def test_a_run_with_old_option_names_is_refused_with_the_new_name(recipes, begun):
    text = (begun / "recipe.toml").read_text("utf-8")
    old = text.replace("max_skipped_fraction", "most_skipped")
    (begun / "recipe.toml").write_text(old, encoding="utf-8")
    said = r"^data\.most_skipped is now data\.max_skipped_fraction; write the new name$"
    with pytest.raises(UsageError, match=said):
        prepare_folder(begun, recipes[0], True, False)
