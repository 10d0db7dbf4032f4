"""Models traced with one example work for other lengths, batch sizes and paddings."""

import pytest
import torch
from conftest import TINY, make_model
from torch import nn

import cn_clip.clip as clip

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Text(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model.encode_text(ids)


class Image(Text):
    def forward(self, images):
        return self.model.encode_image(images)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_text_tower_traced_with_a_short_text_embeds_long_ones(tiny_model):
    traced = torch.jit.trace(Text(tiny_model), clip.tokenize(["猫"]))
    ids = clip.tokenize(["一只猫", "一只飞机飞过蓝天", "猫", ""])
    close(traced(ids), tiny_model.encode_text(ids))
    assert not torch.equal(*traced(ids)[:2])
    close(traced(ids[:, :20]), tiny_model.encode_text(ids))  # also of another length


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(TINY))
def test_an_image_tower_traced_with_one_image_embeds_several(kind):
    model = make_model(TINY[kind])
    size = model.config.vision.resolution
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    close(torch.jit.trace(Image(model), images[:1])(images), model.encode_image(images))


@torch.no_grad()
def test_torch_fx_traces_the_text_tower(tiny_model):
    ids = clip.tokenize(["一只猫", "一只飞机飞过蓝天"])
    close(torch.fx.symbolic_trace(Text(tiny_model))(ids), tiny_model.encode_text(ids))


@torch.no_grad()
def test_the_older_onnx_exporter_records_untrimmed_text(tiny_model, monkeypatch):
    ids = clip.tokenize(["猫"])
    lengths = []
    monkeypatch.setattr(
        tiny_model.bert.embeddings, "forward", lambda x: lengths.append(x.shape[1]) or x[..., None]
    )
    monkeypatch.setattr(tiny_model.bert, "encoder", nn.Module())
    tiny_model.bert.encoder.layer = nn.ModuleList()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(RuntimeError):  # a tower without layers has no features
        tiny_model.encode_text(ids)
    assert lengths == [52]


# Attributes of the official objects; the values are those of cn-clip 1.6.0.


@torch.inference_mode()
def test_bert_has_the_official_signature(tiny_model):
    ids = clip.tokenize(["一只猫", "一只飞机飞过蓝天"])
    output = tiny_model.bert(ids, attention_mask=(ids != 0).float())
    assert len(output) == 2 and output[1] is None
    close(output[0][:, 0] @ tiny_model.text_projection, tiny_model.encode_text(ids))
    ones = tiny_model.bert(ids, attention_mask=torch.ones_like(ids))[0]
    close(tiny_model.bert(ids)[0], ones)
    assert not torch.allclose(ones[:, 0], output[0][:, 0], atol=1e-3)


def test_the_towers_have_the_official_attributes(any_tiny_model):
    config = any_tiny_model.config
    assert any_tiny_model.visual.output_dim == config.embed_dim
    assert any_tiny_model.visual.input_resolution == config.vision.resolution
    assert any_tiny_model.dtype == torch.float32
    assert any_tiny_model.tokenizer.vocab["[PAD]"] == 0
