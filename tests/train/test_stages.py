"""Frozen parameters, training modes and early stopping of a stage."""

from fnmatch import fnmatchcase

import pytest
import torch
from conftest import TINY, make_model
from torch import nn

from cn_clip.errors import UsageError
from cn_clip.model.text import SelfAttention
from cn_clip.train.early_stopping import EarlyStopping
from cn_clip.train.model.freeze import (
    batch_norm_mode,
    freeze,
    is_trainable,
    set_modes,
    statistics_frozen,
)
from cn_clip.train.recipe.schema import EarlyStoppingOptions, Stage, Start


def buffers(model):
    return {name: each.clone() for name, each in model.named_buffers()}


def changed_buffers(model):
    """Run the image tower once, and return the buffers that it changed."""
    before = buffers(model)
    model.encode_image(torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    return {name for name, each in model.named_buffers() if not torch.equal(each, before[name])}


@pytest.mark.parametrize(
    "patterns",
    [
        (),
        ("visual.*",),
        ("visual.transformer.resblocks.0.*", "bert.embeddings.*"),
        ("*.bias",),
        ("logit_scale",),
        ("bert.encoder.layer.?.attention.*",),
        ("*",),
    ],
)
def test_parameters_that_match_are_frozen_and_all_others_trainable(tiny_model, patterns):
    tiny_model.requires_grad_(False)
    frozen = freeze(tiny_model, patterns)
    for name, parameter in tiny_model.named_parameters():
        held = any(fnmatchcase(name, pattern) for pattern in patterns)
        assert parameter.requires_grad is not held
        assert (name in frozen) is held


def test_a_later_stage_unfreezes_parameters(tiny_model):
    freeze(tiny_model, ["visual.*"])
    freeze(tiny_model, [])
    assert all(parameter.requires_grad for parameter in tiny_model.parameters())


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("visul.*", r"did you mean visual\.\*"),
        ("bert.encoder.layers.*", r"bert\.encoder\.layer\.\*"),
        ("logit_scal", "logit_scale"),
        ("visual", r"'visual' matches no parameter; did you mean visual\.\*"),
        ("qqqq", "see: cn-clip train --recipe RECIPE --show parameters"),
    ],
)
def test_a_pattern_without_a_match_suggests_the_nearest_names(tiny_model, pattern, near):
    with pytest.raises(UsageError, match=near):
        freeze(tiny_model, ["bert.*", pattern])


@pytest.mark.parametrize("kind", ["resnet", "efficientnet_lite"])
def test_a_frozen_batch_norm_keeps_its_statistics_and_another_does_not(kind):
    model = make_model(TINY[kind])
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    counters = {f"{n}.{each}" for n in norms for each in ("running_mean", "running_var")}

    freeze(model, [])
    set_modes(model)
    assert counters <= changed_buffers(model)

    held = "visual.layer1.*" if kind == "resnet" else "visual.backbone.blocks.0.*"
    freeze(model, [held])
    set_modes(model)
    found = changed_buffers(model)
    assert found and not any(fnmatchcase(name, held) for name in found)
    assert {name for name in counters if not fnmatchcase(name, held)} <= found

    freeze(model, ["visual.*"])
    set_modes(model)
    assert not changed_buffers(model)


def test_of_trained_weights_the_best_are_taken_though_the_start_is_better():
    stopping = EarlyStopping(best=0.5, mark=0.5)
    assert [stopping.add_trained(score) for score in (0.3, 0.2, 0.4, 0.4)] == [1, 0, 1, 0]
    assert stopping.best == 0.5 and stopping.trained == 0.4


@pytest.mark.parametrize("kind", ["resnet", "efficientnet_lite"])
def test_frozen_statistics_do_not_freeze_batch_norm_weights(kind):
    model = make_model(TINY[kind])
    freeze(model, [])
    model.train()
    set_modes(model, frozen_statistics=True)
    assert batch_norm_mode(model) == "frozen"
    assert not changed_buffers(model)
    assert all(is_trainable(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    set_modes(model)
    assert batch_norm_mode(model) == "train"


def test_a_model_without_batch_norm_has_no_mode_of_it(tiny_model):
    set_modes(tiny_model)
    assert batch_norm_mode(tiny_model) is None


@pytest.mark.parametrize(
    ("option", "start", "frozen"),
    [
        ("auto", {"checkpoint": "mini"}, True),
        ("auto", {"checkpoint": "mini", "model": "mini"}, True),
        ("auto", {"model": "RN50", "image": "RN50.pt", "text": "rbt3.pt"}, False),
        ("auto", {"checkpoint": "RN50", "image": "RN50.pt"}, False),
        ("auto", {"checkpoint": "RN50", "text": "rbt3.pt"}, False),
        ("auto", {"model": "RN50"}, False),
        ("frozen", {"model": "RN50"}, True),
        ("train", {"checkpoint": "mini"}, False),
    ],
)
def test_statistics_are_frozen_when_a_checkpoint_is_fine_tuned(option, start, frozen):
    assert statistics_frozen(Stage(batch_norm=option), Start(**start)) is frozen


@pytest.mark.parametrize(
    ("patterns", "visual", "bert"),
    [
        ((), True, True),
        (("visual.*",), False, True),
        (("bert.*",), True, False),
        (("visual.*", "bert.*"), False, False),
        (("visual.conv1.*",), True, True),
    ],
)
def test_a_completely_frozen_tower_is_in_eval_mode(tiny_model, patterns, visual, bert):
    freeze(tiny_model, patterns)
    set_modes(tiny_model)
    for tower, training in ((tiny_model.visual, visual), (tiny_model.bert, bert)):
        assert {module.training for module in tower.modules()} == {training}


def test_only_a_trainable_text_tower_uses_dropout(tiny_model):
    ids = torch.tensor([[101, 5, 6, 7, 102]])
    freeze(tiny_model, ["bert.*"])
    set_modes(tiny_model)
    assert torch.equal(tiny_model.encode_text(ids), tiny_model.encode_text(ids))
    freeze(tiny_model, [])
    set_modes(tiny_model)
    assert not torch.equal(tiny_model.encode_text(ids), tiny_model.encode_text(ids))


def test_the_dropout_of_a_stage_is_every_one_of_the_text_tower(tiny_model):
    set_modes(tiny_model)
    rates = [m.p for m in tiny_model.modules() if isinstance(m, nn.Dropout)]
    assert set(rates) == {TINY["vit"].text.dropout}
    set_modes(tiny_model, dropout=0.0)
    ids = torch.tensor([[101, 5, 6, 7, 102]])
    assert torch.equal(tiny_model.encode_text(ids), tiny_model.encode_text(ids))
    set_modes(tiny_model, dropout=0.3)
    assert {m.p for m in tiny_model.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert {m.dropout for m in tiny_model.modules() if isinstance(m, SelfAttention)} == {0.3}


@pytest.mark.parametrize(
    ("scores", "patience", "min_gain", "ends_at", "best_at"),
    [
        ([0.1, 0.2, 0.3, 0.4], 1, 0.01, None, 3),
        ([0.1, 0.1], 1, 0.0, 1, 0),
        ([0.5, 0.4, 0.3, 0.2], 3, 0.01, 3, 0),
        ([0.5, 0.4, 0.6, 0.5, 0.4], 2, 0.01, 4, 2),
        # a gain too small to count is still the best, and many small ones add up to one that counts
        ([0.5, 0.505, 0.509], 2, 0.01, 2, 2),
        ([0.5, 0.505, 0.511, 0.515], 2, 0.01, None, 3),
        ([0.5, 0.4, 0.51], 2, 0.01, None, 2),
        ([0.0, 0.0, 0.0], 2, 0.0, 2, 0),
    ],
)
def test_a_stage_ends_when_the_score_has_not_risen_for_so_many_evaluations(
    scores, patience, min_gain, ends_at, best_at
):
    stopping, options, ended = EarlyStopping(), EarlyStoppingOptions(patience, min_gain), None
    for step, score in enumerate(scores):
        best_before = stopping.best
        is_best = stopping.add(score, step, options)
        assert is_best is (best_before is None or score > best_before)
        if ended is None and stopping.ended(options):
            ended = step
    assert ended == ends_at
    assert (stopping.best_step, stopping.best) == (best_at, max(scores))


def test_without_a_plateau_a_stage_never_ends_by_its_score():
    stopping = EarlyStopping()
    assert [stopping.add(0.5, step, None) for step in range(9)] == [True] + 8 * [False]
    assert not stopping.ended(None)


def test_a_later_stage_must_beat_the_score_of_the_earlier_one():
    stopping = EarlyStopping(best=0.5, mark=0.5)
    assert not stopping.add(0.49, 10, EarlyStoppingOptions(1))
    assert (
        stopping.ended(EarlyStoppingOptions(1)) and stopping.best == 0.5 and stopping.best_step == 0
    )
