"""Gradients of a batch: in one piece, in chunks, with dropout, masks, BatchNorm and teachers."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, make_model

from cn_clip.data.loading.loader import stack_keys, token_ids
from cn_clip.data.sources.base import Row
from cn_clip.embedder import Embedder
from cn_clip.train.batches.batch import LocalBatch
from cn_clip.train.batches.text_targets import TextTargetBatch
from cn_clip.train.loss import clip_loss, sigmoid_loss
from cn_clip.train.model.freeze import set_modes
from cn_clip.train.recipe.schema import Loss, Stage
from cn_clip.train.step import Heads, MixedPrecision, Towers, _hash_seed, backward

CPU = torch.device("cpu")
PRECISION = MixedPrecision(CPU, None, torch.amp.GradScaler("cpu", enabled=False))
TEXTS = [
    "猫",
    "一只白色的狗",
    "红苹果",
    "火箭发射",
    "猫",
    "蓝天",
    "两个人",
    "书",
    "雨伞",
    "船",
]


def batch_of(resolution, count=10):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 3, resolution, resolution), generator=generator)
    rows = [Row(text, str(n), str(n)) for n, text in enumerate(TEXTS[:count])]
    keys = stack_keys([[n, n, TEXTS.index(text)] for n, text in enumerate(TEXTS[:count])])
    return LocalBatch(pixels.to(torch.uint8), None, token_ids(TEXTS[:count], 52), rows, keys)


def towers_of(kind, stage=None, dropout=0.0, teacher_dim=None):
    stage = stage or Stage(epochs=1)
    config = TINY[kind]
    model = make_model(replace(config, text=replace(config.text, dropout=dropout)))
    torch.manual_seed(0)
    towers = Towers(model, Heads(stage, config.embed_dim, teacher_dim), stage)
    set_modes(model)
    return towers


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def gradients(towers):
    return {n: p.grad.clone() for n, p in towers.named_parameters() if p.grad is not None}


def run(towers, batch, stage, chunks, **options):
    towers.zero_grad()
    result = backward(towers, batch, stage, PRECISION, chunks=chunks, seed=(0, 0, 0), **options)
    return float(result), gradients(towers)


def assert_same(one, other, tolerance=1e-5):
    assert set(one) == set(other)
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], atol=tolerance, rtol=1e-4, msg=name)


@pytest.mark.parametrize("chunks", [2, 3, 10])
@pytest.mark.parametrize("kind", ["clip", "sigmoid"])
def test_gradient_caching_gives_the_gradients_of_the_full_batch(chunks, kind):
    stage = Stage(epochs=1, loss=Loss(kind=kind))
    towers, batch = towers_of("vit", stage), batch_of(32)
    plain_loss, plain = run(towers, batch, stage, 1)
    loss, cached = run(towers, batch, stage, chunks)
    assert loss == pytest.approx(plain_loss, abs=1e-6)
    assert_same(plain, cached)


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"mask_ratio": 0.5}])
def test_gradient_caching_draws_the_same_dropout_and_masks_in_both_passes(options):
    stage = Stage(epochs=1, mask_ratio=options.get("mask_ratio", 0.0))
    towers = towers_of("vit", stage, dropout=options.get("dropout", 0.0))
    batch, chunks = batch_of(32), 3
    _, cached = run(towers, batch, stage, chunks)
    towers.zero_grad()
    outs = []  # the oracle: the same chunks with the same draws, all in memory at once
    pixels, ids = batch.pixels.tensor_split(chunks), batch.ids.tensor_split(chunks)
    for number in range(chunks):
        torch.manual_seed(_hash_seed(0, 0, 0, 0, number))
        outs.append(towers(pixels[number], None, ids[number]))
    image, text = (torch.cat([out[n] for out in outs]) for n in (0, 1))
    clip_loss(image, text, outs[0][2], keys=batch.keys).backward()
    assert_same(gradients(towers), cached)


def test_batch_norm_counts_a_batch_once_with_gradient_caching():
    stage, batch = Stage(epochs=1), batch_of(64)
    towers = towers_of("resnet", stage)
    norm = towers.model.visual.bn1
    before = norm.running_mean.clone()
    run(towers, batch, stage, 2)
    halves = []
    for half in batch.pixels.tensor_split(2):
        towers.model.visual.bn1.running_mean.copy_(before)
        with torch.no_grad():
            towers.encode_pixels(half)
        halves.append(norm.running_mean.clone())
    # The second pass alone: the first half moved it by a tenth, then the second did.
    towers.model.visual.bn1.running_mean.copy_(before)
    run(towers, batch, stage, 2)
    moved = norm.running_mean
    expected = halves[1] + 0.9 * (halves[0] - before)
    torch.testing.assert_close(moved, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["resnet", "efficientnet_lite"])
def test_with_frozen_statistics_gradient_caching_is_exact_with_batch_norm_too(kind):
    stage, batch = Stage(epochs=1), batch_of(TINY[kind].vision.resolution)
    towers = towers_of(kind, stage)
    set_modes(towers.model, frozen_statistics=True)
    before = {name: each.clone() for name, each in towers.model.named_buffers()}
    plain_loss, plain = run(towers, batch, stage, 1)
    loss, cached = run(towers, batch, stage, 3)
    assert loss == pytest.approx(plain_loss, abs=1e-6)
    assert_same(plain, cached, 1e-4)
    assert all(torch.equal(before[name], each) for name, each in towers.model.named_buffers())


def test_a_frozen_image_tower_gets_no_gradients_and_cached_features_are_equivalent():
    stage, batch = Stage(epochs=1), batch_of(32)
    towers = towers_of("vit", stage)
    towers.model.visual.requires_grad_(False)
    set_modes(towers.model)
    loss, online = run(towers, batch, stage, 1)
    assert not any(name.startswith("model.visual.") for name in online)
    with torch.no_grad():
        features = towers.encode_pixels(batch.pixels)
    kept = LocalBatch(None, features, batch.ids, batch.rows, batch.keys)
    cached_loss, cached = run(towers, kept, stage, 1)
    assert cached_loss == pytest.approx(loss, abs=1e-6)
    assert_same(online, cached)


def test_two_captions_of_one_image_are_not_negatives_by_default():
    batch, towers = batch_of(32), towers_of("vit")
    batch.keys[1, 0] = batch.keys[0, 0]
    aware, _ = run(towers, batch, Stage(epochs=1), 1)
    plain, _ = run(towers, batch, Stage(epochs=1, loss=Loss(duplicates=False)), 1)
    with torch.no_grad():
        out = towers(batch.pixels, None, batch.ids)
        logits = out[2] * out[0] @ out[1].T
    target = torch.arange(10)
    cross = torch.nn.functional.cross_entropy
    wanted = float(cross(logits, target) + cross(logits.T, target)) / 2
    assert plain == pytest.approx(wanted, abs=1e-5)
    assert aware != pytest.approx(plain, abs=1e-3)


def test_a_teacher_mixes_its_similarities_into_the_targets():
    stage = Stage(epochs=1, loss=Loss(teacher="t", teacher_weight=1.0, duplicates=False))
    teacher = Embedder.from_model(make_model(TINY["vit"], seed=5))
    batch, towers = batch_of(32), towers_of("vit", stage, teacher_dim=teacher.dim)
    loss, _ = run(towers, batch, stage, 1, teacher=teacher)
    pictures = list(batch.pixels.permute(0, 2, 3, 1).numpy())
    image, text = (
        torch.from_numpy(x) for x in (teacher.embed_images(pictures), teacher.embed_texts(TEXTS))
    )
    wanted = teacher.logit_scale * image @ text.T
    with torch.no_grad():
        out = towers(batch.pixels, None, batch.ids)
        logits = out[2] * out[0] @ out[1].T
    both = [-(wanted.softmax(dim) * logits.log_softmax(dim)).sum(dim).mean() for dim in (1, 0)]
    assert loss == pytest.approx(float(sum(both) / 2), abs=1e-5)


def test_a_learned_projection_is_trained_towards_the_teachers_features():
    stage = Stage(epochs=1, loss=Loss(teacher="t", teacher_weight=0.0, teacher_features=1.0))
    teacher = Embedder.from_model(make_model(TINY["resnet"], seed=5))
    batch, towers = batch_of(64), towers_of("efficientnet_lite", stage, teacher_dim=teacher.dim)
    _, one = run(towers, batch, stage, 1, teacher=teacher)
    _, more = run(towers, batch, stage, 1, teacher=teacher)
    assert one["heads.image.weight"].abs().sum() > 0
    assert_same(one, more)  # the teacher is the same each time


@pytest.mark.parametrize("chunks", [1, 3, 10])  # 10: more than there are sentences
@pytest.mark.parametrize("kind", ["clip", "sigmoid"])
def test_text_targets_add_their_mean_cosine_distance_to_the_loss(kind, chunks):
    stage = Stage(epochs=1, loss=Loss(kind=kind, text_targets="s", text_targets_weight=0.7))
    towers, batch = towers_of("vit", stage), batch_of(32)
    places = unit(torch.randn(4, 32, generator=torch.Generator().manual_seed(2)))
    held = TextTargetBatch(token_ids(["木", "一个很长很长的句子", "河流", "灯"], 52), places)
    loss, found = run(towers, batch, stage, chunks, text_targets=held)
    towers.zero_grad()
    out = towers(batch.pixels, None, batch.ids)
    distance = 1 - (unit(towers.model.encode_text(held.ids)) * places).sum() / 4
    if kind == "sigmoid":
        pairs = sigmoid_loss(out.image, out.text, out.logit_scale, out.logit_bias, keys=batch.keys)
    else:
        pairs = clip_loss(out.image, out.text, out.logit_scale, keys=batch.keys)
    wanted = pairs + 0.7 * distance
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), abs=1e-5)
    assert_same(gradients(towers), found)


def test_float16_gradients_are_scaled_and_unscaled():
    batch, stage = batch_of(32), Stage(epochs=1)
    towers = towers_of("vit", stage)
    _, plain = run(towers, batch, stage, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(towers.parameters(), lr=0.0)
    towers.zero_grad()
    backward(towers, batch, stage, MixedPrecision(CPU, None, scaler), chunks=3, seed=(0, 0, 0))
    scaled = gradients(towers)
    scaler.unscale_(optimizer)
    assert scaled["model.text_projection"].norm() > 500 * plain["model.text_projection"].norm()
    assert_same(plain, gradients(towers))
