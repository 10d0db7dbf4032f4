"""Low-rank updates: nothing at the start, nothing else learns, nothing is lost by merging."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, make_model
from torch.nn.utils import parametrize

from cn_clip.errors import UsageError
from cn_clip.train.model.freeze import freeze, set_modes
from cn_clip.train.model.lora import add_lora, plain_state
from cn_clip.train.optim import parameter_groups
from cn_clip.train.recipe.schema import Lora, Optimizer

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[101, n, n + 1, 102] for n in (5, 60, 700, 8000)])
LORA = Lora(layers=(*Lora().layers, "text_projection"), rank=2)


def outputs(model):
    return torch.cat([model.encode_image(IMAGES), model.encode_text(IDS)])


def updated(lora=LORA, seed=0):
    """A model of which nothing but updates learns."""
    model = make_model(TINY["vit"])
    freeze(model, ["*"])
    return model, add_lora(model, lora, torch.Generator().manual_seed(seed))


def trained(steps=3):
    model, _ = updated()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    set_modes(model, dropout=0.0)
    for _ in range(steps):
        image, text = outputs(model).chunk(2)
        F.cross_entropy(F.normalize(image) @ F.normalize(text).T, torch.arange(4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_at_the_start_the_output_is_bit_for_bit_the_same():
    plain, (model, _) = make_model(TINY["vit"]), updated()
    assert torch.equal(outputs(model), outputs(plain))


def test_patterns_name_the_matrices_that_are_updated():
    model, names = updated()
    attention = ("key", "query", "value")
    assert names == [
        *(f"bert.encoder.layer.0.attention.self.{each}.weight" for each in attention),
        *(f"bert.encoder.layer.1.attention.self.{each}.weight" for each in attention),
        "text_projection",
        *(f"visual.transformer.resblocks.{n}.attn.in_proj_weight" for n in (0, 1)),
    ]
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(learning) == 2 * len(names)
    assert all(name.endswith((".lora_a", ".lora_b")) for name in learning)


def test_the_update_is_alpha_over_rank_times_b_a():
    model, _ = updated(Lora(layers=("text_projection",), rank=2, alpha=6.0))
    before = model.text_projection.detach().clone()
    update = model.parametrizations.text_projection[0]
    assert update.lora_a.shape == (2, before.shape[1]) and update.lora_b.shape == (len(before), 2)
    with torch.no_grad():
        update.lora_b.fill_(1.0)
    expected = before + 3.0 * (update.lora_b @ update.lora_a)
    torch.testing.assert_close(model.text_projection, expected)


def test_training_changes_the_updates_and_nothing_else():
    model, (start, _) = trained(), updated()
    before = start.state_dict()
    assert not torch.equal(outputs(model), outputs(start))
    for name, tensor in model.state_dict().items():
        is_update = name.endswith((".lora_a", ".lora_b"))
        assert torch.equal(tensor, before[name]) is not is_update, name


def test_merging_gives_the_same_output_under_the_official_names():
    model = trained()
    before, state = outputs(model), plain_state(model)
    assert torch.equal(outputs(model), before)  # the model stays
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for attribute in list(module.parametrizations):
                parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=0)
    merged, plain = model.state_dict(), make_model(TINY["vit"])
    assert state.keys() == merged.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], merged[name]) for name in merged)
    plain.load_state_dict(state)
    torch.testing.assert_close(outputs(plain), before, rtol=0, atol=0)


def test_the_plain_state_of_a_model_without_updates_is_its_state(tiny_model):
    state = plain_state(tiny_model)
    assert state.keys() == tiny_model.state_dict().keys()
    assert all(torch.equal(state[n], t) for n, t in tiny_model.state_dict().items())


def test_the_draws_of_the_start_depend_on_the_seed_alone():
    first, again, other = (updated(seed=seed)[0].state_dict() for seed in (1, 1, 2))
    name = "parametrizations.text_projection.0.lora_a"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])


def test_an_update_has_the_learning_rate_of_its_layer():
    model, _ = updated()
    groups = parameter_groups(model.named_parameters(), Optimizer(layer_decay=0.5))
    scales = {name: group["scale"] for group in groups for name in group["names"]}
    for name, scale in scales.items():
        above = 0 if "text_projection" in name else 1 if ".1." in name else 2
        assert scale == 0.5**above, name


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("*.ln_1.weight", r"ln_1\.weight has shape \[64\]; match matrices only"),
        ("visual.conv1.weight", r"has shape \[64, 3, 8, 8\]"),
        ("visual.*.in_proj_wieght", "lora.layers: the pattern .* matches no parameter"),
    ],
)
def test_a_parameter_that_is_not_a_matrix_is_refused(tiny_model, pattern, said):
    with pytest.raises(UsageError, match=said):
        add_lora(tiny_model, Lora(layers=(pattern,)), torch.Generator())
