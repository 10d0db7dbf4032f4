"""Where the weights come from: files that the owners' libraries wrote, checkpoints, random."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, TINY, make_model

from cn_clip import weights
from cn_clip.config import MODELS
from cn_clip.errors import CheckpointError, MissingWeightsError, UnknownModelError, UsageError
from cn_clip.train.model.init import initial_model
from cn_clip.train.recipe.schema import Start

IMAGE = str(GOLDEN / "towers" / "openai_vit.pt")


@pytest.fixture
def text(tmp_path):
    """A BERT as Hugging Face names it, with heads for pre-training."""
    state = {n: t for n, t in make_model(TINY["vit"], 5).state_dict().items() if "bert." in n}
    heads = {"bert.pooler.dense.weight": torch.zeros(64, 64), "cls.predictions.bias": torch.ones(9)}
    torch.save(state | heads, tmp_path / "roberta.bin")
    return str(tmp_path / "roberta.bin")


@pytest.fixture
def checkpoint(tmp_path):
    weights.save_folder(make_model(TINY["vit"], 3), tmp_path / "tiny")
    return str(tmp_path / "tiny")


def state_of(start, seed=0):
    return initial_model(start, seed)[0].state_dict()


def assert_covers(origins, model):
    """Every tensor that learns comes from one place, and is named there."""
    names = [name for origin in origins for name in origin.names]
    assert len(names) == len(set(names))
    assert {name for name, _ in model.named_parameters()} <= set(names)


def test_two_towers_are_read_and_the_rest_is_random_and_logged(checkpoint, text):
    model, origins = initial_model(Start(model=checkpoint, image=IMAGE, text=text), 0)
    assert_covers(origins, model)
    image, bert, random = origins
    assert image.place == IMAGE and bert.place == text
    assert random.place == "random numbers" and random.names == ("text_projection",)
    assert "logit_scale" in image.names and all(n.startswith("bert.") for n in bert.names)
    assert set(bert.dropped) == {"bert.pooler.dense.weight", "cls.predictions.bias"}
    assert "token_embedding.weight" in image.dropped
    state = model.state_dict()
    for tower in (weights.image_tower(IMAGE), weights.text_tower(text)):
        assert all(torch.equal(state[n], t.float()) for n, t in tower.tensors.items())
    assert {t.dtype for t in state.values()} == {torch.float32}


def test_an_origin_is_one_line_for_the_log(checkpoint, text):
    _, (image, bert, random) = initial_model(Start(model=checkpoint, image=IMAGE, text=text), 0)
    count = len(image.names)
    assert str(image).startswith(
        f"logit_scale, visual.* ({count} tensors) from {IMAGE}; left out: "
    )
    assert str(image).endswith(f" and {len(image.dropped) - 3} more")
    assert str(bert).startswith(f"bert.* ({len(bert.names)} tensors) from {text}; left out: ")
    assert str(random) == "text_projection (1 tensors) from random numbers"


def test_a_given_image_tower_keeps_its_features(checkpoint):
    golden = np.load(GOLDEN / "towers" / "features.npz")
    model, _ = initial_model(Start(model=checkpoint, image=IMAGE), 0)
    with torch.no_grad():
        ours = model.eval().encode_image(torch.from_numpy(golden["images_32"])).numpy()
    np.testing.assert_allclose(ours, golden["openai_vit"], atol=1e-5, rtol=1e-5)


def test_a_checkpoint_alone_is_the_whole_model(checkpoint):
    model, origins = initial_model(Start(checkpoint=checkpoint), 0)
    expected = make_model(TINY["vit"], 3).state_dict()
    assert model.config == TINY["vit"]
    assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())
    (origin,) = origins
    assert origin.place == checkpoint and set(origin.names) == expected.keys()


def test_a_tower_replaces_that_of_the_checkpoint(checkpoint, text):
    model, origins = initial_model(Start(checkpoint=checkpoint, text=text), 0)
    assert_covers(origins, model)
    assert [origin.place for origin in origins] == [checkpoint, text]
    assert not any(name.startswith("bert.") for name in origins[0].names)
    mine, other = make_model(TINY["vit"], 3).state_dict(), make_model(TINY["vit"], 5).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (other if name.startswith("bert.") else mine)[name])


@pytest.mark.parametrize("kind", TINY)
def test_random_weights_depend_on_the_seed_alone(tmp_path, kind):
    weights.save_folder(make_model(TINY[kind]), tmp_path / "tiny")
    start = Start(model=str(tmp_path / "tiny"))
    first, again, other = (state_of(start, seed) for seed in (1, 1, 2))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first["text_projection"], other["text_projection"])
    for name, tensor in first.items():
        assert tensor.isfinite().all()
        assert not name.endswith("num_batches_tracked") or tensor == 0
    model, (origin,) = initial_model(start, 1)
    assert_covers([origin], model)


@pytest.mark.parametrize("given", ["checkpoint", "image"])
def test_another_resolution_resizes_the_positions(checkpoint, given):
    start = (
        Start(checkpoint=checkpoint) if given == "checkpoint" else Start(checkpoint, image=IMAGE)
    )
    model, _ = initial_model(replace(start, resolution=48), 0)
    name = "visual.positional_embedding"
    before = (
        make_model(TINY["vit"], 3).state_dict()[name]
        if given == "checkpoint"
        else weights.image_tower(IMAGE).tensors[name]
    )
    assert model.config.vision.resolution == 48
    expected = weights.resize_positions(before, 6 * 6 + 1).float()
    torch.testing.assert_close(model.state_dict()[name], expected)
    assert model.eval().encode_image(torch.zeros(1, 3, 48, 48)).isfinite().all()


def test_a_resnet_keeps_its_resolution(tmp_path):
    weights.save_folder(make_model(TINY["resnet"]), tmp_path / "tiny")
    with pytest.raises(CheckpointError, match=r"1 wrongly shaped \(visual\.attnpool\.positional"):
        initial_model(Start(checkpoint=str(tmp_path / "tiny"), resolution=96), 0)


def test_more_of_a_text_can_be_read(checkpoint):
    model, _ = initial_model(Start(checkpoint=checkpoint, context_length=128), 0)
    assert model.config == replace(TINY["vit"], context_length=128)
    with pytest.raises(CheckpointError, match=r"context_length = 600, above text\.max_positions"):
        initial_model(Start(checkpoint=checkpoint, context_length=600), 0)


@pytest.mark.parametrize("option", ["checkpoint", "image", "text"])
def test_a_missing_file_stops_the_run(checkpoint, option):
    start = replace(Start(model=checkpoint), **{option: "nowhere/weights.pt"})
    with pytest.raises(MissingWeightsError, match=r"no such file.*nowhere/weights\.pt"):
        initial_model(start, 0)


def test_a_folder_without_weights_is_no_start(tmp_path, checkpoint):
    (tmp_path / "empty").mkdir()
    for option in ("checkpoint", "image", "text"):
        with pytest.raises(MissingWeightsError, match="empty"):
            start = replace(Start(model=checkpoint), **{option: str(tmp_path / "empty")})
            initial_model(start, 0)


@pytest.mark.parametrize("option", ["image", "text"])
def test_a_tower_of_another_shape_is_refused_with_both_shapes(tmp_path, text, option):
    config = TINY["vit"]
    if option == "image":
        config = replace(config, vision=replace(config.vision, width=128))
    else:
        config = replace(config, text=replace(config.text, hidden_size=128))
    weights.save_folder(make_model(config), tmp_path / "wide")
    start = Start(model=str(tmp_path / "wide"), **{option: IMAGE if option == "image" else text})
    said = r"tower of tiny-vit from .*: \d+ wrongly shaped \(.* \[.*64.*\] instead of \[.*128.*\]"
    with pytest.raises(CheckpointError, match=said):
        initial_model(start, 0)


def test_a_checkpoint_of_another_model_than_named_is_refused(tmp_path, checkpoint):
    weights.save_folder(make_model(TINY["resnet"]), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"holds tiny-vit for 32 pixels, not tiny-resnet"):
        initial_model(Start(model=str(tmp_path / "other"), checkpoint=checkpoint), 0)


def test_a_file_without_the_tower_is_refused(checkpoint, text):
    with pytest.raises(CheckpointError, match="no image tower"):
        initial_model(Start(model=checkpoint, image=text), 0)
    with pytest.raises(CheckpointError, match="no BERT"):
        initial_model(Start(model=checkpoint, text=IMAGE), 0)


@pytest.mark.parametrize(
    ("start", "error", "said"),
    [
        (Start(), UsageError, "names no model; give --start.model, such as ViT-B-16"),
        (Start(image=IMAGE), UsageError, "names no model"),
        (Start(model="ViT-B-61@RBT3-chinese"), UnknownModelError, "did you mean ViT-B-16"),
        (Start(model="ViT-B-61"), UnknownModelError, "ViT-B-16"),
        (Start(checkpoint="ViT-B-61"), MissingWeightsError, "no such file, folder or model"),
    ],
)
def test_an_incomplete_or_unknown_start_is_refused(start, error, said):
    with pytest.raises(error, match=said):
        initial_model(start, 0)


def test_a_model_is_named_as_officially_too():
    from cn_clip.train.model.init import _config

    assert _config(Start(model="RN50"), None) == MODELS["RN50"]
    struct = _config(Start(model="ViT-B/16@RoBERTa-wwm-ext-base-chinese"), None)
    assert replace(struct, name="ViT-B-16") == MODELS["ViT-B-16"]
