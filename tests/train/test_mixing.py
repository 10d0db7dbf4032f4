"""Mixtures of a stage's best weights with those it began with: chosen, measured, resumed."""

import os
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, make_model
from train.runs import make_recipe

from cn_clip import weights
from cn_clip.data.sources.open import open_mix
from cn_clip.errors import UsageError
from cn_clip.eval.dataset import eval_set_of
from cn_clip.train.interpolation import WEIGHTS, Choice, choose, mix
from cn_clip.train.loop import train
from cn_clip.train.run.events import MixtureScore
from cn_clip.train.run.log import read_log
from cn_clip.train.run.report import write_report
from cn_clip.train.run.signals import InterruptedRun
from cn_clip.train.validation import embed, score

FAST = {"epochs": 6, "optimizer": {"learning_rate": 3e-3, "warmup": 4}}  # learns by heart
AUTO = FAST | {"epochs": 2, "interpolate": "auto"}


def chosen(losses, scores=None, kept=None):
    """The weight that is chosen, and whether the kept pairs lose a point at most."""
    count = len(losses)
    weights = [n / (count - 1) for n in range(count)]
    values = zip(weights, scores or [0.5] * count, losses, kept or [None] * count, strict=True)
    choice = choose([MixtureScore(*each) for each in values])
    return choice.mixture.weight, choice.within


@pytest.mark.parametrize(
    ("losses", "scores", "expected"),
    [
        ([0.5, 0.4, 0.3], None, 1.0),
        ([0.5, 0.3, 0.4], None, 0.5),
        ([0.5, 0.3, 0.3], None, 0.5),  # of equal ones the nearest to the old
        ([0.5, 0.5, 0.5], None, 0.0),
        ([0.5, 0.6, 0.7], None, 0.0),  # nothing is better: the old
        ([0.5, 0.4, 0.3], [0.5, 0.7, 0.6], 1.0),  # more recall of a few pairs may be chance
        ([0.5, 0.4, 0.3], [0.5, 0.5, 0.4], 0.5),  # but less than the old is no gain
        ([0.5, 0.4, 0.3], [0.5, 0.4, 0.4], 0.0),
    ],
)
def test_the_mixture_of_the_lowest_loss_is_chosen_that_has_the_recall_of_the_start(
    losses, scores, expected
):
    assert chosen(losses, scores) == (expected, True)


@pytest.mark.parametrize(
    ("losses", "kept", "expected"),
    [
        ([0.5, 0.4, 0.3], [0.4, 0.39, 0.38], (0.5, True)),  # a point may be lost
        ([0.5, 0.4, 0.3], [0.4, 0.42, 0.41], (1.0, True)),  # the kept pairs gain, too
        ([0.5, 0.4, 0.3], [0.4, 0.389, 0.391], (1.0, True)),
        ([0.5, 0.4, 0.3], [0.4, 0.38, 0.3], (1.0, False)),  # none within is better: the trade
        ([0.5, 0.6, 0.3], [0.4, 0.4, 0.3], (1.0, False)),
        ([0.5, 0.5, 0.6], [0.4, 0.3, 0.3], (0.0, True)),  # nothing is better at all
    ],
)
def test_the_best_mixture_is_chosen_that_loses_at_most_a_point_of_the_kept_pairs(
    losses, kept, expected
):
    assert chosen(losses, kept=kept) == expected


def swept(folder):
    (event,) = (event for event in read_log(folder) if event["kind"] == "mixtures")
    return event


def assert_measured(found, config, states, validation, kept=None):
    """The oracle: each mixture made by hand, and measured as any model is."""
    old, new = states
    for each in found["mixtures"]:
        share = each["weight"]
        mixed = {
            n: (1 - share) * old[n] + share * new[n] if new[n].is_floating_point() else new[n]
            for n in new
        }
        for key, pairs in (("score", validation), ("kept", kept)):
            if pairs is None:
                continue
            model = weights.build(weights.Checkpoint(config, dict(mixed)))
            images, texts = embed(model, pairs, autocast=None)
            recall = score(images, texts, pairs).mean_recall
            assert each[key] == pytest.approx(recall, abs=0.02)  # a tie may fall otherwise
            if key == "score":  # one text for each image: plain cross-entropy
                logits = model.logit_scale.detach().exp() * torch.from_numpy(
                    images[pairs.pairs[:, 0]] @ texts[pairs.pairs[:, 1]].T
                )
                own = torch.arange(len(logits))
                loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
                assert each["loss"] == pytest.approx(float(loss), abs=1e-3)


@pytest.mark.parametrize("kind", ["resnet", "efficientnet_lite"])
def test_statistics_of_batch_norm_are_mixed_like_weights(kind):
    old, new = (make_model(TINY[kind], seed=seed).state_dict() for seed in (0, 1))
    for name, tensor in new.items():
        if name.endswith(("running_mean", "running_var")):
            tensor.add_(0.5)
    model = make_model(TINY[kind])
    mix(model, old, new, 0.25)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 0.75 * old[name] + 0.25 * new[name])
    for weight, state in ((0.0, old), (1.0, new)):
        mix(model, old, new, weight)
        floats = [n for n, tensor in state.items() if tensor.is_floating_point()]
        assert all(torch.equal(model.state_dict()[name], state[name]) for name in floats)


def test_auto_measures_every_mixture_and_goes_on_with_the_best(pairs, start, tmp_path):
    """With the pairs to keep measured, too."""
    run, seen = tmp_path / "run", pairs[0]
    recipe = make_recipe((seen, seen), start, run, AUTO, data={"keep_data": [pairs[1]]})
    outcome = train(recipe)
    found = swept(run)
    assert [each["weight"] for each in found["mixtures"]] == list(WEIGHTS)
    validation, kept = (eval_set_of(open_mix([uri])) for uri in (seen, pairs[1]))
    states = [weights.read(f).tensors for f in (run / "start", run / "stages" / "1-train")]
    config = weights.read(start).config
    assert_measured(found, config, states, validation, kept)
    best = choose([MixtureScore(**each) for each in found["mixtures"]])
    assert (found["weight"], found["within"]) == (best.mixture.weight, best.within)
    final = weights.read(run / "final").tensors
    for name, tensor in final.items():
        if tensor.is_floating_point():
            wanted = torch.lerp(*(state[name].float() for state in states), best.mixture.weight)
            torch.testing.assert_close(tensor.float(), wanted, atol=1e-5, rtol=1e-4)
    scores = dict(outcome.scores)
    assert scores["train, mixed"] == scores["final"] == pytest.approx(best.mixture.score)
    names = ("stage", "weight", "within", "mixtures")
    assert outcome.mixtures == [{name: found[name] for name in names}]
    text = (run / "report.html").read_text("utf-8")
    assert "Interpolated weights of stage train" in text and text.count("<polyline") == 4 + 2


def test_a_locked_image_tower_is_run_once_for_all_mixtures(pairs, start, tmp_path):
    """And the scores are those of mixtures whose images are embedded each time."""
    stage = AUTO | {"freeze": ["visual.*"]}
    train(make_recipe((pairs[0], pairs[0]), start, tmp_path / "run", stage))
    states = [
        weights.read(tmp_path / "run" / folder).tensors for folder in ("start", "stages/1-train")
    ]
    validation = eval_set_of(open_mix([pairs[0]]))
    assert_measured(swept(tmp_path / "run"), weights.read(start).config, states, validation)


def test_a_stop_among_the_mixtures_measures_them_again_and_ends_alike(pairs, start, tmp_path):
    def stop(event):
        if event["kind"] == "tick" and event["what"] == "measuring mixtures" and event["done"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    seen = (pairs[0], pairs[0])
    recipe = make_recipe(seen, start, tmp_path / "run", AUTO)
    with pytest.raises(InterruptedRun, match=r"mixtures.*--resume auto") as stopped:
        train(recipe, on_event=stop)
    assert stopped.value.code == 130
    outcome = train(recipe, resume=True)
    whole = train(make_recipe(seen, start, tmp_path / "whole", AUTO))
    assert outcome.scores == whole.scores and outcome.mixtures == whole.mixtures
    final, wanted = (weights.read(tmp_path / n / "final").tensors for n in ("run", "whole"))
    assert all(torch.equal(final[name], each) for name, each in wanted.items())


def test_a_loss_of_the_kept_pairs_that_no_mixture_avoids_is_warned_of_and_shown(
    pairs, start, tmp_path, monkeypatch
):
    taken = "cn_clip.train.interpolation.choose"
    monkeypatch.setattr(taken, lambda found: Choice(found[-1], within=False))
    data = {"keep_data": [pairs[1]]}
    train(make_recipe((pairs[0], pairs[0]), start, tmp_path / "run", AUTO, data=data))
    found = swept(tmp_path / "run")
    assert found["within"] is False and found["weight"] > 0
    *_, warning = (e["text"] for e in read_log(tmp_path / "run") if e["kind"] == "warning")
    assert warning.startswith("no mixture of stage train gains without costing the kept pairs")
    assert warning in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_a_stage_that_gains_nothing_hands_on_what_it_began_with(pairs, start, tmp_path):
    still = {"interpolate": "auto", "optimizer": {"learning_rate": 0.0}}
    outcome = train(make_recipe(pairs, start, tmp_path / "run", still))
    assert [each["weight"] for each in outcome.mixtures] == [0.0]
    before, after = (weights.read(f).tensors for f in (start, tmp_path / "run" / "final"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_that_score_below_the_start_are_mixed_too_and_never_harm(pairs, start, tmp_path):
    """The best of those that were trained: the start's score is no bar to being mixed with it."""
    wild = {"learning_rate": 0.05, "warmup": 0, "schedule": "constant"}
    stage = {"epochs": 2, "optimizer": wild}
    outcomes = {
        name: train(make_recipe(pairs, start, tmp_path / name, stage | {"interpolate": option}))
        for name, option in (("auto", "auto"), ("half", 0.5))
    }
    scores = [e["mean_recall"] for e in read_log(tmp_path / "auto") if e["kind"] == "score"]
    before, trained = scores[0], scores[1:3]
    assert max(trained) < before  # nothing that a number would mix
    assert outcomes["half"].scores[-1] == ("final", before)
    found = swept(tmp_path / "auto")["mixtures"]
    assert found[0]["score"] == before and found[-1]["score"] == max(trained)
    chosen = choose([MixtureScore(**each) for each in found]).mixture
    assert outcomes["auto"].scores[-1][1] == chosen.score >= before


def test_the_curve_says_the_weight_and_both_scores(pairs, start, tmp_path):
    recipe = make_recipe(pairs, start, tmp_path / "run", AUTO)
    (tmp_path / "run").mkdir()
    line = (
        '{"kind": "mixtures", "total": 3, "time": 1, "stage": "a<b", "weight": 0.5, "within": true,'
        ' "mixtures": [{"weight": 0.0, "score": 0.25, "loss": 1.5, "kept": 0.5},'
        ' {"weight": 0.5, "score": 0.375, "loss": 1.4377, "kept": 0.4921}]}\n'
    )
    (tmp_path / "run" / "log.jsonl").write_text(line, encoding="utf-8")
    write_report(tmp_path / "run", recipe, None)
    text = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "Interpolated weights of stage a&lt;b" in text
    curves = "new weights 0.5: 12.5", "new weights 0.5: -0.79"
    for each in ("37.5", "50.0", "49.2", "1.438", *curves, "chosen"):
        assert each in text


@pytest.mark.parametrize(
    ("stage", "data", "said"),
    [
        ({"interpolate": "auto"}, {"val": []}, r"stages\.train\.interpolate is auto: .*--val-data"),
        ({}, {"keep_data": ["csv:x.csv"]}, r"data\.keep_data .*--interpolate auto.*--keep-data"),
        ({"interpolate": 0.5}, {"keep_data": ["csv:x.csv"]}, r"data\.keep_data .*--keep-data"),
        ({"interpolate": "best"}, {}, r"interpolate 'best'.*auto"),
    ],
)
def test_what_cannot_be_chosen_is_refused(pairs, start, tmp_path, stage, data, said):
    with pytest.raises(UsageError, match=said):
        make_recipe(pairs, start, tmp_path / "run", stage, data=data)
