"""The mean image embedding is projected out of the text tower once, before the first step."""

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
from cn_clip.train.loop import train
from cn_clip.train.model.center import center_texts
from cn_clip.train.run.signals import InterruptedRun
from cn_clip.train.validation import embed

CACHED = {"freeze": ["visual.*"], "cached": True, "center_texts": True, "interpolate": "auto"}


@pytest.mark.parametrize("kind", sorted(TINY))
def test_texts_lose_the_direction_of_the_mean_image_and_nothing_else(kind):
    model = make_model(TINY[kind])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 100, (5, 7), generator=generator)
    mean = torch.randn(model.config.embed_dim, generator=generator)
    with torch.no_grad():
        before = model.encode_text(ids)
        center_texts(model, mean)
        after = model.encode_text(ids)
    direction = F.normalize(mean, dim=0)
    torch.testing.assert_close(after @ direction, torch.zeros(5), atol=1e-5, rtol=0)
    expected = before - torch.outer(before @ direction, direction)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-4)


def test_a_run_centers_by_its_training_images_and_measures_the_start_before(pairs, start, tmp_path):
    """With a learning rate of 0 nothing else changes."""
    still = CACHED | {"optimizer": {"learning_rate": 0.0}}
    outcome = train(make_recipe(pairs, start, tmp_path / "run", still))
    old, new = (weights.read(tmp_path / "run" / f).tensors for f in ("start", "stages/1-train"))
    images, _ = embed(
        weights.build(weights.read(start)), eval_set_of(open_mix([pairs[0]])), autocast=None
    )
    direction = F.normalize(torch.from_numpy(images.mean(axis=0)), dim=0)
    projection = old["text_projection"]
    expected = projection - torch.outer(projection @ direction, direction)
    torch.testing.assert_close(new["text_projection"], expected, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(old[n], new[n]) for n in old if n != "text_projection")
    (mixtures,) = outcome.mixtures
    assert mixtures["mixtures"][0]["score"] == dict(outcome.scores)["before"]


@pytest.mark.parametrize("at", [1, 4])
def test_a_run_that_resumes_is_centered_once(pairs, start, tmp_path, at):
    def stop(event):
        if event["kind"] == "step" and event["total"] == at:
            os.kill(os.getpid(), signal.SIGINT)

    whole = train(make_recipe(pairs, start, tmp_path / "whole", CACHED))
    recipe = make_recipe(pairs, start, tmp_path / "run", CACHED)
    with pytest.raises(InterruptedRun):
        train(recipe, on_event=stop)
    assert train(recipe, resume=True).mixtures == whole.mixtures
    ends = [weights.read(tmp_path / n / "stages/1-train").tensors for n in ("run", "whole")]
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())


@pytest.mark.parametrize(
    ("stage", "machine"),
    [({"center_texts": True}, {}), (CACHED, {"parallel": "fsdp"})],
)
def test_centering_without_cached_features_or_with_shards_is_refused(
    pairs, start, tmp_path, stage, machine
):
    with pytest.raises(UsageError, match=r"stages\.train\.center_texts needs cached .*ddp"):
        make_recipe(pairs, start, tmp_path / "run", stage, machine=machine)
