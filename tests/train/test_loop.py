"""Whole runs of a second: stages, plateaus, cached features, what stops a run, what is written."""

import json
import math
import os
import shutil
import signal
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import cosines
from train.runs import CAPTIONS, from_toml, make_recipe, write_pairs, write_start

import cn_clip
from cn_clip import weights
from cn_clip.embeddings.files import read_captions
from cn_clip.errors import CheckpointError, DataError, TrainingError, UsageError
from cn_clip.eval.dataset import EvalSet
from cn_clip.train import loop
from cn_clip.train.loop import train
from cn_clip.train.run import checkpoint as states_on_disk
from cn_clip.train.run.log import Log, read_log
from cn_clip.train.run.run_dir import prepare_folder
from cn_clip.train.run.signals import InterruptedRun

OPTIMIZER = {"learning_rate": 1e-3, "warmup": 2}
FAST = {"epochs": 6, "optimizer": {"learning_rate": 3e-3, "warmup": 4}}  # learns by heart
LOCKED = {"name": "locked", "freeze": ["visual.*"], "optimizer": OPTIMIZER}


def events(folder, kind):
    return [event for event in read_log(folder) if event["kind"] == kind]


def losses(folder):
    return [event["loss"] for event in events(folder, "step")]


def tensors(folder):
    return weights.read(folder).tensors


def test_a_run_of_two_stages_gives_a_model_that_loads(pairs, start, tmp_path):
    run = tmp_path / "run"
    outcome = train(make_recipe(pairs, start, run, LOCKED, {"name": "all", "optimizer": OPTIMIZER}))
    assert outcome.steps == 2 * 2 * 3
    assert [name for name, _ in outcome.scores] == ["before", "locked", "all", "final"]
    assert cn_clip.load(outcome.weights).dim == 32
    assert (run / "report.html").is_file()
    stages = events(run, "stage")
    assert [event["stage"] for event in stages] == ["locked", "all"]
    assert stages[0]["trainable"] < stages[1]["trainable"]


def test_frozen_parameters_are_bit_equal_after_a_stage(pairs, start, tmp_path):
    train(make_recipe(pairs, start, tmp_path / "run", LOCKED, data={"val": []}))
    before, after = tensors(start), tensors(tmp_path / "run" / "final")
    assert all(torch.equal(before[name], after[name]) for name in before if "visual." in name)
    assert not torch.equal(before["text_projection"], after["text_projection"])


def test_the_resolved_recipe_lies_in_the_run(pairs, start, tmp_path):
    recipe = make_recipe(pairs, start, tmp_path / "run", {"steps": 1, "epochs": None})
    train(recipe)
    assert from_toml((tmp_path / "run" / "recipe.toml").read_text("utf-8")) == recipe


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("resnet", {"micro_batch_size": 6}),
        ("efficientnet_lite", {"optimizer": FAST["optimizer"] | {"ema": 0.5}}),
        ("efficientnet_lite", {"lora": {"layers": ["bert.*.self.*.weight", "text_projection"]}}),
    ],
)
def test_fine_tuning_freezes_batch_norm_statistics_and_logs_it(pairs, tmp_path, kind, options):
    """Also after evaluations, which put the model in another mode."""
    begin, run = write_start(tmp_path / "start", kind), tmp_path / "run"
    train(make_recipe(pairs, begin, run, {"epochs": 2} | options))
    before = tensors(begin)
    names = [name for name in before if name.endswith(STATISTICS)]
    last = {name: torch.full_like(before[name], 7) for name in [*names, "logit_scale"]}
    states_on_disk.load_tensors(states_on_disk.states(run)[-1], {"model": last})
    assert names and all(torch.equal(before[name], last[name]) for name in names)
    assert not torch.equal(before["logit_scale"], last["logit_scale"])
    assert [event["batch_norm"] for event in events(run, "stage")] == ["frozen"]


@pytest.mark.parametrize("kind", ["resnet", "efficientnet_lite"])
def test_batch_norm_statistics_are_updated_if_the_recipe_says_so(pairs, tmp_path, kind):
    begin, run = write_start(tmp_path / "start", kind), tmp_path / "run"
    train(make_recipe(pairs, begin, run, {"batch_norm": "train"}, data={"val": []}))
    before, after = tensors(begin), tensors(run / "final")
    moved = [name for name in before if name.endswith(STATISTICS[:2])]
    assert moved and not any(torch.equal(before[name], after[name]) for name in moved)
    assert [event["batch_norm"] for event in events(run, "stage")] == ["train"]


def test_cached_features_give_the_losses_of_online_images(pairs, start, tmp_path):
    online = make_recipe(pairs, start, tmp_path / "online", LOCKED, data={"val": []})
    cached = make_recipe(
        pairs, start, tmp_path / "cached", LOCKED | {"cached": True}, data={"val": []}
    )
    train(online)
    train(cached)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "online"), abs=1e-5)
    assert len(losses(tmp_path / "cached")) == 6


def test_augmented_views_are_cached_too(pairs, start, tmp_path):
    options = {"cached": True, "augment": True, "views": 2}
    recipe = make_recipe(pairs, start, tmp_path / "run", LOCKED | options, data={"val": []})
    train(recipe)
    online = make_recipe(
        pairs, start, tmp_path / "online", LOCKED | {"augment": True}, data={"val": []}
    )
    train(online)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "online"), abs=1e-5)


def test_a_stage_ends_by_plateau_and_hands_on_its_best_weights(pairs, start, tmp_path):
    frozen = {"learning_rate": 1e-9, "warmup": 0}  # nothing will change, so nothing will rise
    stages = (
        {"name": "still", "epochs": 50, "early_stopping": {"patience": 2}, "optimizer": frozen},
        {"name": "next", "epochs": 1, "optimizer": frozen},
    )
    outcome = train(make_recipe(pairs, start, tmp_path / "run", *stages))
    assert outcome.steps == (2 + 1) * 3
    before, after = tensors(start), tensors(tmp_path / "run" / "final")
    assert all(torch.equal(before[name], after[name]) for name in before)  # none was better


def test_the_best_weights_are_kept_not_the_last(pairs, start, tmp_path):
    wild = {"learning_rate": 0.3, "warmup": 0, "schedule": "constant"}
    stage = {"epochs": 4, "optimizer": wild}
    outcome = train(
        make_recipe(pairs, start, tmp_path / "run", stage, output={"stop_at_chance": 0})
    )
    scores = [event["mean_recall"] for event in events(tmp_path / "run", "score")]
    assert dict(outcome.scores)["final"] == pytest.approx(max(scores), abs=1e-9)


def test_the_score_before_training_is_logged_with_later_ones(pairs, start, tmp_path):
    train(make_recipe(pairs, start, tmp_path / "run"))
    first, *later = events(tmp_path / "run", "score")
    assert first["total"] == 0
    from cn_clip.data.sources.open import open_mix
    from cn_clip.eval.dataset import eval_set_of
    from cn_clip.train.validation import embed, score

    validation = eval_set_of(open_mix([pairs[1]]))
    model = weights.build(weights.read(start))
    found = score(*embed(model, validation, autocast=None), validation)
    assert first["mean_recall"] == pytest.approx(found.mean_recall)
    assert {event["before"] for event in later} == {first["mean_recall"]}


def test_a_nan_loss_stops_the_run_and_keeps_the_weights(pairs, start, tmp_path):
    wild = {"learning_rate": 10.0, "warmup": 0, "schedule": "constant"}
    stage = {"epochs": 50, "optimizer": wild | {"eps": 1e-30, "beta2": 0.0}}
    model = weights.build(weights.read(start))
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.fill_(float("nan"))
    weights.save_folder(model, tmp_path / "broken")
    recipe = make_recipe(pairs, tmp_path / "broken", tmp_path / "run", stage, data={"val": []})
    with pytest.raises(TrainingError, match=r"the loss is nan at step 1.*learning rate.*tenth"):
        train(recipe)
    assert (tmp_path / "run" / "start" / "model.safetensors").is_file()


def test_a_loss_at_chance_stops_the_run_and_names_cause_and_remedy(tmp_path, start):
    val = write_pairs(tmp_path, "val", range(100, 104))
    write_pairs(tmp_path, "train", range(16))
    rows = [  # one picture for all: nothing can be told apart
        {"image": "0.png", "text": CAPTIONS[n], "image_id": f"{n}", "text_id": f"{n}"}
        for n in range(16)
    ]
    (tmp_path / "same.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe = make_recipe(
        (f"jsonl:{tmp_path / 'same.jsonl'}", val),
        start,
        tmp_path / "run",
        {"epochs": 200},
        output={"stop_at_chance": 60},
        evaluation={"every_epochs": 0},
    )
    with pytest.raises(TrainingError, match=r"after 62 steps .* ln\(16\) = 2.773 .*tenth.*check"):
        train(recipe)


def test_lora_trains_little_and_ends_as_plain_weights(pairs, start, tmp_path):
    stage = {"lora": {"rank": 2}, "freeze": ["visual.*", "bert.*", "text_projection"]}
    train(make_recipe(pairs, start, tmp_path / "run", stage, data={"val": []}))
    (begun,) = events(tmp_path / "run", "stage")
    assert begun["trainable"] < 10_000
    before, after = tensors(start), tensors(tmp_path / "run" / "final")
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "bert.encoder.layer.0.attention.self.query.weight" in changed
    assert all("attn.in_proj" in n or ".self." in n or n == "logit_scale" for n in changed)


def test_a_stage_interpolates_its_final_and_initial_weights(pairs, start, tmp_path):
    """And its mixture is measured; a run that is killed after it mixes once all the same."""
    run, seen = tmp_path / "run", (pairs[0], pairs[0])
    one_epoch, mixed = LOCKED | {"epochs": 1}, FAST | {"name": "all", "interpolate": 0.5}
    recipe = make_recipe(seen, start, run, one_epoch, mixed)
    outcome = train(recipe)
    one, two = (tensors(run / "stages" / name) for name in ("1-locked", "2-all"))
    final = tensors(run / "final")
    assert not torch.equal(one["text_projection"], two["text_projection"])
    for name in one:
        torch.testing.assert_close(final[name], (one[name] + two[name]) / 2)
    scores = {event["stage"]: event["mean_recall"] for event in events(run, "score")}
    assert list(scores) == ["locked", "all", "all, mixed", "final"]
    assert scores["all, mixed"] == scores["final"]
    (run / "outcome.json").unlink()
    shutil.rmtree(run / "final")
    assert train(recipe, resume=True).scores == outcome.scores
    assert all(torch.equal(final[name], each) for name, each in tensors(run / "final").items())


def test_the_next_stage_starts_from_the_interpolated_weights_and_their_score(
    pairs, start, tmp_path
):
    run, seen = tmp_path / "run", (pairs[0], pairs[0])
    still = {"name": "still", "epochs": 1, "optimizer": {"learning_rate": 0.0}}
    outcome = train(make_recipe(seen, start, run, FAST | {"interpolate": 0.25}, still))
    before, after, final = (
        tensors(folder) for folder in (start, run / "stages" / "1-train", run / "final")
    )
    for name in before:
        wanted = 0.75 * before[name] + 0.25 * after[name]
        torch.testing.assert_close(final[name], wanted, atol=1e-6, rtol=1e-5)
    scores = dict(outcome.scores)
    assert scores["train, mixed"] == scores["still"] == scores["final"] < scores["train"]


def test_text_targets_pull_texts_to_them_with_cached_images_too(pairs, start, sentences, tmp_path):
    targets = {
        "text_targets": str(sentences),
        "text_targets_weight": 5.0,
        "text_targets_batch_size": 20,
    }
    stage = LOCKED | {"cached": True, "epochs": 8, "loss": targets}
    train(make_recipe(pairs, start, tmp_path / "run", stage, data={"val": []}))
    stored = read_captions(sentences)
    near = [
        cosines(cn_clip.load(str(folder)).embed_texts(stored.ids), stored.vectors).mean()
        for folder in (start, tmp_path / "run" / "final")
    ]
    assert near[1] > near[0] + 0.1


def test_unusable_text_targets_are_refused_before_features_are_computed(pairs, start, tmp_path):
    stage = LOCKED | {"cached": True, "loss": {"text_targets": str(tmp_path / "nowhere")}}
    with pytest.raises(UsageError, match=r"no folder .*nowhere; make it with: cn-clip embed texts"):
        train(make_recipe(pairs, start, tmp_path / "run", stage, data={"val": []}))
    assert not (tmp_path / "run" / "features").exists()


def test_averaged_weights_are_evaluated_and_saved(pairs, start, tmp_path):
    steady = OPTIMIZER | {"schedule": "constant"}
    for name, decay in (("ema", 0.9), ("plain", 0.0)):
        stage = {"optimizer": steady | {"ema": decay}}
        train(make_recipe(pairs, start, tmp_path / name, stage, data={"val": []}))
    assert losses(tmp_path / "ema") == losses(tmp_path / "plain")
    ema, plain = (tensors(tmp_path / n / "final")["text_projection"] for n in ("ema", "plain"))
    first = tensors(start)["text_projection"]
    assert 0 < (ema - first).norm() < 0.95 * (plain - first).norm()


def test_the_score_precision_does_not_change_training(pairs, start, tmp_path):
    def run(precision, scored):
        out = tmp_path / f"{precision}-{scored}"
        stage = {"steps": 2, "epochs": None}
        machine = {"precision": precision, "device": "cpu"}
        evaluation = {"score_precision": scored}
        train(make_recipe(pairs, start, out, stage, machine=machine, evaluation=evaluation))
        return losses(out), np.load(out / "before.npz")["images"]

    trained, rough = run("bf16", None)
    same, exact = run("bf16", "fp32")
    _, wanted = run("fp32", None)
    assert same == trained
    np.testing.assert_array_equal(exact, wanted)
    assert np.abs(rough - wanted).max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "precision"),  # convolutions in float16 take minutes on a CPU
    [("vit", "bf16"), ("vit", "fp16"), ("resnet", "bf16"), ("efficientnet_lite", "bf16")],
)
def test_every_tower_trains_in_half_precision(pairs, tmp_path, kind, precision):
    begin = write_start(tmp_path / "start", kind)
    recipe = make_recipe(
        pairs,
        begin,
        tmp_path / "run",
        {
            "epochs": 1,
            "micro_batch_size": 6,
            "augment": True,
            "optimizer": OPTIMIZER | {"max_grad_norm": 1.0},
        },
        machine={"precision": precision, "device": "cpu", "grad_checkpointing": True},
        data={"val": []},
    )
    train(recipe)
    found = losses(tmp_path / "run")
    assert len(found) == 3 and all(map(math.isfinite, found))


@pytest.mark.full  # compiling takes a minute
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_tower_gives_the_losses_of_a_plain_one(pairs, start, tmp_path):
    pytest.importorskip("torch._inductor")
    recipe = {"data": {"val": []}}
    plain = make_recipe(pairs, start, tmp_path / "plain", {"steps": 2, "epochs": None}, **recipe)
    train(plain)
    recipe["machine"] = {"precision": "fp32", "device": "cpu", "compile": True}
    train(make_recipe(pairs, start, tmp_path / "fast", {"steps": 2, "epochs": None}, **recipe))
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)


def test_validation_pairs_in_the_training_data_are_named(pairs, start, tmp_path):
    same = pairs[0], pairs[0]
    train(make_recipe(same, start, tmp_path / "run", {"steps": 1, "epochs": None}))
    (warning,) = events(tmp_path / "run", "warning")
    assert warning["text"].startswith("48 validation pairs are in the training data")
    assert len((tmp_path / "run" / "shared.txt").read_text("utf-8").splitlines()) == 48


def test_bf16_on_a_cpu_without_it_is_a_warning_once(pairs, start, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "cpu_lacks_bfloat16", lambda: True)
    for precision, warnings in (("bf16", 1), ("fp32", 0)):
        machine = {"precision": precision, "device": "cpu"}
        folder = tmp_path / precision
        stage = {"steps": 1, "epochs": None}
        train(make_recipe(pairs, start, folder, stage, data={"val": []}, machine=machine))
        found = [event["text"] for event in events(folder, "warning")]
        assert len(found) == warnings and all("--precision fp32" in text for text in found)


def test_a_second_run_in_the_folder_is_refused_unless_it_resumes(pairs, start, tmp_path):
    recipe = make_recipe(pairs, start, tmp_path / "run", {"steps": 2, "epochs": None})
    first = train(recipe)
    with pytest.raises(UsageError, match=r"has a run; resume it with --resume auto"):
        train(recipe)
    assert train(recipe, resume=True) == first
    other = make_recipe(pairs, start, tmp_path / "run", {"steps": 3, "epochs": None})
    with pytest.raises(UsageError, match=r"stages.train.steps: 2, now 3.*--allow-changes"):
        train(other, resume=True)


def test_a_disk_full_inside_a_save_leaves_the_state_before_it(pairs, start, tmp_path, monkeypatch):
    run = tmp_path / "run"
    recipe = make_recipe(pairs, start, run, {"epochs": 3})
    save, count = states_on_disk.save, 0

    def full(*given, **options):
        nonlocal count
        count += 1
        if count == 3:
            save(*given, **options)  # half of it is there when the disk is full
            raise OSError(28, "No space left on device")
        return save(*given, **options)

    monkeypatch.setattr(states_on_disk, "save", full)
    with pytest.raises(CheckpointError, match=r"step 6 was not saved.*No space left.*000003"):
        train(recipe)
    assert [path.name for path in states_on_disk.states(run)] == ["000000000", "000000003"]
    monkeypatch.undo()
    outcome = train(recipe, resume=True)
    train(make_recipe(pairs, start, tmp_path / "whole", {"epochs": 3}))
    assert outcome.steps == 9
    assert losses(run) == losses(tmp_path / "whole")


def test_a_signal_ends_an_evaluation_and_the_resumed_run_is_unchanged(
    pairs, start, tmp_path, monkeypatch
):
    read, count, fatal = EvalSet.image_bytes, 0, 0

    def counted(self, number):
        nonlocal count
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, number)

    monkeypatch.setattr(EvalSet, "image_bytes", counted)
    whole = train(make_recipe(pairs, start, tmp_path / "whole", {"epochs": 2}))
    recipe = make_recipe(pairs, start, tmp_path / "run", {"epochs": 2})
    images = 16  # of a score
    # In the first score, in that after epoch 1, and again in that: each is measured again.
    for at, states in ((2, 0), (images + 2, 2), (2, 2)):
        count, fatal = 0, at
        with pytest.raises(InterruptedRun, match="Resume with") as stopped:
            train(recipe, resume=True)
        assert stopped.value.code == 128 + signal.SIGTERM
        assert count <= fatal + 1
        assert len(states_on_disk.states(tmp_path / "run")) == states
    fatal = 0
    outcome = train(recipe, resume=True)
    assert outcome.scores == whole.scores
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_only_the_newest_states_are_kept(pairs, start, tmp_path):
    recipe = make_recipe(
        pairs, start, tmp_path / "run", {"epochs": 4}, output={"keep": 2, "save_every": 1}
    )
    train(recipe)
    assert [p.name for p in states_on_disk.states(tmp_path / "run")] == ["000000011", "000000012"]


def test_a_copy_of_a_state_and_notes_in_one_outlive_the_newer_states(pairs, start, tmp_path):
    run = tmp_path / "run"
    output = {"keep": 1, "save_every": 1}
    train(make_recipe(pairs, start, run, {"steps": 2, "epochs": None}, output=output))
    shutil.copytree(run / "states" / "000000002", run / "states" / "000000002.good")
    (run / "states" / "000000002" / "notes.txt").write_text("mine", encoding="utf-8")
    more = make_recipe(pairs, start, run, {"steps": 4, "epochs": None}, output=output)
    assert train(more, resume=True, allow_changes=True).steps == 4
    assert [path.name for path in states_on_disk.states(run)] == ["000000002", "000000004"]
    assert (run / "states" / "000000002" / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert (run / "states" / "000000002.good" / "progress.json").is_file()


def test_comments_in_the_recipe_of_a_run_outlive_its_going_on(pairs, start, tmp_path):
    run = tmp_path / "run"
    recipe = make_recipe(pairs, start, run, {"steps": 1, "epochs": None})
    train(recipe)
    written = (run / "recipe.toml").read_text(encoding="utf-8")
    (run / "recipe.toml").write_text(f"# why\n{written}", encoding="utf-8")
    (run / "outcome.json").unlink()
    train(recipe, resume=True)
    assert (run / "recipe.toml").read_text(encoding="utf-8") == f"# why\n{written}"
    longer = make_recipe(pairs, start, run, {"steps": 2, "epochs": None})
    train(longer, resume=True, allow_changes=True)
    assert (run / "recipe.toml").read_text(encoding="utf-8") == longer.to_toml()


def test_an_empty_source_is_refused(start, tmp_path, pairs):
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    with pytest.raises((UsageError, DataError), match=r"no pair|holds no|empty"):
        train(make_recipe((f"jsonl:{tmp_path / 'empty.jsonl'}", pairs[1]), start, tmp_path / "run"))


def test_a_batch_that_cannot_be_read_at_all_is_passed_over(start, tmp_path):
    uri = write_pairs(tmp_path, "train", range(17))
    recipe = make_recipe(
        (uri, uri), start, tmp_path / "run", {"epochs": 1},
        data={"val": [], "max_skipped_fraction": 0.5},
    )  # fmt: skip
    from cn_clip.data.loading.sampler import plan_of
    from cn_clip.data.sources.open import open_mix

    last = plan_of(open_mix([uri]), recipe.seed).pairs_at(0, np.array([16]))[1][0]
    (tmp_path / f"{last}.png").write_bytes(b"broken")
    outcome = train(recipe)
    assert outcome.steps == 2
    assert len(losses(tmp_path / "run")) == 1


def test_the_callback_gets_all_events_of_the_log(pairs, start, tmp_path):
    told = []
    train(make_recipe(pairs, start, tmp_path / "run"), on_event=told.append)
    assert [e for e in told if e["kind"] != "tick"] == read_log(tmp_path / "run")
    assert {e["kind"] for e in told} == {"start", "stage", "score", "step", "saved", "end", "tick"}


def test_the_outcome_is_plain_values(pairs, start, tmp_path):
    outcome = train(make_recipe(pairs, start, tmp_path / "run", {"steps": 1, "epochs": None}))
    written = json.loads((tmp_path / "run" / "outcome.json").read_text("utf-8"))
    assert written == json.loads(json.dumps(asdict(outcome)))


def test_a_run_resumed_with_a_larger_batch_recounts_its_epochs(pairs, start, tmp_path):
    small = {"epochs": 2, "global_batch_size": 8}
    recipe = make_recipe(pairs, start, tmp_path / "run", small, output={"save_every": 1})

    def stop(event):
        if event["kind"] == "step" and event["total"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRun):
        train(recipe, on_event=stop)
    large = small | {"global_batch_size": 24}  # of which an epoch has two batches, not six
    changed = make_recipe(pairs, start, tmp_path / "run", large, output={"save_every": 1})
    outcome = train(changed, resume=True, allow_changes=True)
    assert outcome.steps >= 4


def test_a_finished_run_resumes_if_it_is_made_longer(pairs, start, tmp_path):
    options = {"optimizer": OPTIMIZER | {"schedule": "constant"}}
    short = make_recipe(pairs, start, tmp_path / "run", options | {"epochs": 1})
    assert train(short).steps == 3
    longer = make_recipe(pairs, start, tmp_path / "run", options | {"epochs": 3})
    assert train(longer, resume=True, allow_changes=True).steps == 9
    train(make_recipe(pairs, start, tmp_path / "whole", options | {"epochs": 3}))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_two_cached_stages_with_different_towers_are_one_run(pairs, start, tmp_path):
    cached = {"freeze": ["visual.*"], "cached": True, "epochs": 1, "optimizer": OPTIMIZER}
    stages = (cached | {"name": "one"}, {"name": "all", "epochs": 1}, cached | {"name": "two"})
    outcome = train(make_recipe(pairs, start, tmp_path / "run", *stages, data={"val": []}))
    assert outcome.steps == 9


def test_a_stop_before_a_due_evaluation_saves_first_and_evaluates_after_resume(
    pairs, start, tmp_path
):
    def stop(event):
        if event["kind"] == "step" and event["total"] == 3:  # the epoch's last
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = make_recipe(pairs, start, tmp_path / "run")
    with pytest.raises(InterruptedRun):
        train(recipe, on_event=stop)
    assert [event["total"] for event in events(tmp_path / "run", "score")] == [0]
    train(recipe, resume=True)
    train(make_recipe(pairs, start, tmp_path / "whole"))
    found = [[e["mean_recall"] for e in events(tmp_path / n, "score")] for n in ("run", "whole")]
    assert found[0] == found[1] and len(found[0]) == 4


def test_a_full_disk_under_the_log_is_one_sentence(pairs, start, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Log, "write", full)
    with pytest.raises(CheckpointError, match=r"cannot go on: .*No space left.*--resume auto"):
        train(make_recipe(pairs, start, tmp_path / "run"))


def test_partial_files_of_a_killed_run_are_removed(pairs, start, tmp_path):
    recipe = make_recipe(pairs, start, tmp_path / "run", {"steps": 1, "epochs": None})
    prepare_folder(tmp_path / "run", recipe, False, False)
    left = tmp_path / "run" / "stages" / ".1-train.abcdefgh.cn-clip-tmp" / "new"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    train(recipe)
    assert not left.exists()
