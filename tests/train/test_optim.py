"""The learning rate at each step, the groups of AdamW, the clamp, averaged weights."""

import itertools
import math

import pytest
import torch
from conftest import TINY, make_model
from torch import nn

from cn_clip.config import MODELS
from cn_clip.errors import UsageError
from cn_clip.model.clip import CLIP
from cn_clip.train.optim import (
    Average,
    clamp_logit_scale,
    lr_at,
    make_optimizer,
    parameter_groups,
    peak_lr,
    set_lr,
)
from cn_clip.train.recipe.schema import Optimizer


def official_lr(step, steps, base, warmup):
    """training/scheduler.py of the official package, as open_clip's."""
    if step < warmup:
        return base * (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) * base


def skeleton(config):
    with torch.device("meta"):
        return CLIP(config)


@pytest.mark.parametrize("base", [5e-5, 3e-5, 1.0])
@pytest.mark.parametrize(("steps", "warmup"), [(10, 0), (10, 1), (250, 100), (366, 6), (3, 2)])
def test_warm_up_and_cosine_are_the_official_ones(steps, warmup, base):
    optimizer = Optimizer(learning_rate=base, warmup=warmup)
    for step in range(steps):
        ours = base * lr_at(step, steps, optimizer)
        assert ours == pytest.approx(official_lr(step, steps, base, warmup), rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [0, 1, 40])
def test_every_schedule_rises_to_the_peak_and_never_jumps(schedule, warmup):
    optimizer = Optimizer(schedule=schedule, warmup=warmup)
    lrs = [lr_at(step, 400, optimizer) for step in range(400)]
    assert max(lrs) == 1 and lrs[max(0, warmup - 1)] == lrs[warmup] == 1
    assert all(0 < lr <= 1 for lr in lrs)
    assert lrs[warmup:] == sorted(lrs[warmup:], reverse=True)
    if warmup == 40:  # no step changes the lr by more than one of the warm-up does
        assert max(abs(a - b) for a, b in itertools.pairwise(lrs)) < 1 / 40 + 1e-12


def test_the_inverse_square_root_halves_at_four_times_the_warm_up():
    optimizer = Optimizer(schedule="inverse_sqrt", warmup=50)
    assert lr_at(200, 10**6, optimizer) == pytest.approx(0.5)
    assert lr_at(5000, 10**6, optimizer) == pytest.approx(0.1)


@pytest.mark.parametrize("steps", [1, 9, 60, 100])
def test_a_warm_up_longer_than_the_stage_still_reaches_the_peak(steps):
    lrs = [lr_at(step, steps, Optimizer(warmup=100)) for step in range(steps)]
    assert max(lrs) == 1 and min(lrs) > 0


@pytest.mark.parametrize(
    ("scaling", "reference", "batch", "expected"),
    [
        ("linear", 1024, 128, 1e-4 / 8),
        ("linear", 128, 1024, 8e-4),
        ("sqrt", 1024, 64, 1e-4 / 4),
        ("none", 1024, 64, 1e-4),
        ("linear", None, 64, 1e-4),
        ("sqrt", 64, 64, 1e-4),
    ],
)
def test_the_learning_rate_scales_with_the_batch_size(scaling, reference, batch, expected):
    optimizer = Optimizer(learning_rate=1e-4, scaling=scaling, reference_batch_size=reference)
    assert peak_lr(optimizer, batch) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["ViT-B-16", "RN50"])
def test_weight_decay_excludes_the_same_parameters_as_the_official_training(name):
    named = dict(skeleton(MODELS[name]).named_parameters())

    def excluded(n):  # training/main.py of the official package
        return "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n

    groups = parameter_groups(named.items(), Optimizer(weight_decay=0.2))
    decay = {each: group["weight_decay"] for group in groups for each in group["names"]}
    assert decay == {n: 0.0 if excluded(n) else 0.2 for n in named}
    assert len(groups) == 2
    for group in groups:
        assert all(named[n] is p for n, p in zip(group["names"], group["params"], strict=True))


LAYERS = {  # how many layers stand above, by what a name begins with
    "vit": {
        "visual.proj": 0, "visual.ln_post": 0,
        "visual.transformer.resblocks.1.": 1, "visual.transformer.resblocks.0.": 2,
        "visual.ln_pre": 3, "visual.class_embedding": 3, "visual.positional_embedding": 3,
        "visual.conv1": 3,
    },
    "resnet": {
        "visual.attnpool": 0, "visual.layer4": 1, "visual.layer3": 2, "visual.layer2": 3,
        "visual.layer1": 4, "visual.conv": 5, "visual.bn": 5,
    },
    "efficientnet_lite": {
        "visual.classifier": 0, "visual.sharpness": 0, "visual.prototypes": 0,
        "visual.residual": 0, "visual.backbone.head": 0,
        **{f"visual.backbone.blocks.{n}.": 16 - n for n in range(16)},
        "visual.backbone.stem": 17,
    },
}  # fmt: skip
TEXT_LAYERS = {
    "text_projection": 0, "logit_scale": 0, "bert.encoder.layer.1.": 1, "bert.encoder.layer.0.": 2,
    "bert.embeddings": 3,
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("frozen", [False, True])
def test_layer_decay_multiplies_the_learning_rate_of_each_lower_layer(kind, frozen):
    model = skeleton(TINY[kind])
    if frozen:  # a layer that is held still is a layer all the same
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(LAYERS[kind])[1:3]))
    named = dict(model.named_parameters())
    groups = parameter_groups(named.items(), Optimizer(layer_decay=0.8))
    scales = {each: group["scale"] for group in groups for each in group["names"]}
    assert scales.keys() == {name for name, p in named.items() if p.requires_grad}
    for name, scale in scales.items():
        (above,) = (
            n for start, n in (LAYERS[kind] | TEXT_LAYERS).items() if name.startswith(start)
        )
        assert scale == pytest.approx(0.8**above), name


def test_without_layer_decay_all_lr_multipliers_are_one():
    groups = parameter_groups(make_model(TINY["vit"]).named_parameters(), Optimizer())
    assert [group["scale"] for group in groups] == [1.0, 1.0]


def test_an_lr_is_its_multiplier_times_that_of_its_layer_and_the_last_match_counts():
    named = dict(skeleton(TINY["vit"]).named_parameters())
    rates = ("visual.*=0.1", "*.resblocks.0.*=3", "text_projection=0")
    groups = parameter_groups(named.items(), Optimizer(layer_decay=0.5, lr_multipliers=rates))
    scales = {each: group["scale"] for group in groups for each in group["names"]}
    for name, scale in {
        "visual.proj": 0.1,
        "visual.transformer.resblocks.1.mlp.c_fc.weight": 0.1 * 0.5,
        "visual.transformer.resblocks.0.mlp.c_fc.weight": 3 * 0.25,
        "visual.conv1.weight": 0.1 * 0.125,
        "bert.encoder.layer.1.output.dense.weight": 0.5,
        "text_projection": 0,
        "logit_scale": 1,
    }.items():
        assert scales[name] == pytest.approx(scale), name
    optimizer = make_optimizer(groups, Optimizer())
    set_lr(optimizer, 0.01)
    assert all(g["lr"] == pytest.approx(0.01 * g["scale"]) for g in optimizer.param_groups)


def test_an_lr_pattern_without_a_match_is_refused_with_the_nearest_name():
    named = skeleton(TINY["vit"]).named_parameters()
    with pytest.raises(
        UsageError, match=r"lr_multipliers: the pattern 'bret\.\*' matches no .*did you mean bert"
    ):
        parameter_groups(named, Optimizer(lr_multipliers=("bret.*=0.1",)))


def test_a_step_without_gradients_only_shrinks_decayed_parameters():
    model = make_model(TINY["vit"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = Optimizer(weight_decay=0.5, layer_decay=0.5)
    optimizer = make_optimizer(parameter_groups(model.named_parameters(), options), options)
    set_lr(optimizer, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = dict(model.named_parameters())
    shrunk = {
        "text_projection": 0.95,
        "visual.proj": 0.95,
        "visual.transformer.resblocks.1.mlp.c_fc.weight": 0.975,
        "visual.transformer.resblocks.1.mlp.c_fc.bias": 1,
        "visual.conv1.weight": 1 - 0.05 / 8,
        "visual.ln_pre.weight": 1,
        "bert.encoder.layer.1.output.LayerNorm.weight": 0.975,  # as officially
        "logit_scale": 1,
    }
    for name, factor in shrunk.items():
        torch.testing.assert_close(after[name].detach(), factor * before[name], msg=name)


@pytest.mark.parametrize(("value", "kept"), [(5.0, 4.6052), (-1.0, 0.0), (3.0, 3.0)])
def test_the_logit_scale_stays_between_zero_and_log_100(tiny_model, value, kept):
    with torch.no_grad():
        tiny_model.logit_scale.fill_(value)
    clamp_logit_scale(tiny_model)
    assert tiny_model.logit_scale.item() == pytest.approx(kept)


def test_averaged_weights_equal_the_closed_form():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average = Average(model, 0.25)
    expected = 1.0
    for step, weight in enumerate([2.0, -3.0, 0.5, 7.0]):
        with torch.no_grad():
            model.weight.fill_(weight)
        average.update(model, step)
        decay = [1 / 10, 2 / 11, 3 / 12, 0.25][step]  # min(0.25, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
        assert float(average.shadow["weight"]) == pytest.approx(expected, rel=1e-6)
    assert model.weight.item() == 7.0


def test_swapping_twice_is_the_identity(tiny_model):
    tiny_model.visual.requires_grad_(False)
    average = Average(tiny_model, 0.9)
    assert not any(name.startswith("visual.") for name in average.shadow)
    before = {name: p.detach().clone() for name, p in tiny_model.named_parameters()}
    with torch.no_grad():
        tiny_model.text_projection += 1
    average.swap(tiny_model)
    assert torch.equal(tiny_model.text_projection, before["text_projection"])
    average.swap(tiny_model)
    assert torch.equal(tiny_model.text_projection, before["text_projection"] + 1)
    assert torch.equal(average.shadow["text_projection"], before["text_projection"])
    for name, parameter in tiny_model.named_parameters():
        assert name == "text_projection" or torch.equal(parameter, before[name])


def test_averaged_weights_are_saved_and_loaded(tiny_model):
    average, other = Average(tiny_model, 0.9), Average(tiny_model, 0.9)
    with torch.no_grad():
        tiny_model.text_projection += 1
    average.update(tiny_model, 5)
    assert not torch.equal(other.shadow["text_projection"], average.shadow["text_projection"])
    other.load_state_dict(average.state_dict())
    assert all(torch.equal(other.shadow[n], t) for n, t in average.shadow.items())
