"""Record the names, signatures and results of the official modules, version 1.6.0.

pip install cn-clip==1.6.0
python tests/golden/official/record_official.py
"""

import importlib
import inspect
import json
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from fill import fill  # noqa: E402

MODULES = {
    "cn_clip.clip.model": (
        "CLIP",
        "convert_models_to_fp32",
        "convert_state_dict",
        "convert_weights",
        "resize_pos_embed",
        "restore_model",
    ),
    "cn_clip.clip.bert_tokenizer": ("FullTokenizer", "default_vocab"),
    "cn_clip.clip.utils": (
        "_download",
        "available_models",
        "create_model",
        "image_transform",
        "load",
        "load_from_name",
        "tokenize",
    ),
}
TEXT = {
    "vocab_size": 21128,
    "text_attention_probs_dropout_prob": 0.1,
    "text_hidden_act": "gelu",
    "text_hidden_dropout_prob": 0.1,
    "text_hidden_size": 64,
    "text_initializer_range": 0.02,
    "text_intermediate_size": 128,
    "text_max_position_embeddings": 512,
    "text_num_attention_heads": 1,
    "text_num_hidden_layers": 2,
    "text_type_vocab_size": 2,
}
INFO = {
    "vit": TEXT
    | {
        "embed_dim": 32,
        "image_resolution": 32,
        "vision_layers": 2,
        "vision_width": 64,
        "vision_patch_size": 8,
    },
    "resnet": TEXT
    | {
        "embed_dim": 32,
        "image_resolution": 64,
        "vision_layers": [1, 1, 1, 1],
        "vision_width": 8,
        "vision_patch_size": None,
    },
}
TEXTS = ["杰尼龟，在水边", "a small fire dragon", "皮卡丘"]
TOKENS = ["Hello world, it's a dog's 杰尼龟！ iPhone15Pro", "unaffable naïve ＡＢＣ"]


def filled(model):
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(np.asarray(fill(name, tuple(tensor.shape)))))
    return model.eval()


def main():
    from cn_clip.clip import model as official
    from cn_clip.clip import tokenize
    from cn_clip.clip.bert_tokenizer import FullTokenizer

    names, arrays = {}, {}
    for module, members in MODULES.items():
        loaded = importlib.import_module(module)
        names[module] = {
            name: list(inspect.signature(getattr(loaded, name)).parameters) for name in members
        }
    half = {}
    for kind, info in INFO.items():
        model = filled(official.CLIP(**info))
        side = info["image_resolution"]
        images = torch.from_numpy(fill(f"images {side}", (2, 3, side, side)))
        ids = tokenize(TEXTS)
        with torch.no_grad():
            arrays[f"{kind} image"] = model.encode_image(images).numpy()
            arrays[f"{kind} text"] = model.encode_text(ids).numpy()
            official.convert_weights(model)
            half[kind] = sorted(n for n, p in model.named_parameters() if p.dtype == torch.half)
            arrays[f"{kind} half text"] = model.encode_text(ids).numpy()
            if kind == "vit":
                arrays["vit half image"] = model.encode_image(images).numpy()
    larger = official.CLIP(**INFO["vit"] | {"image_resolution": 48})
    state = {f"module.{n}": t for n, t in filled(official.CLIP(**INFO["vit"])).state_dict().items()}
    official.resize_pos_embed(state, larger, prefix="module.")
    arrays["resized"] = state["module.visual.positional_embedding"].numpy()
    plain = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    official.restore_model(
        larger, plain, {"bert.pooler.dense.bias": torch.zeros(64), **plain}, False
    )
    arrays["restored image"] = (
        larger.float()
        .encode_image(torch.from_numpy(fill("images 48", (2, 3, 48, 48))))
        .detach()
        .numpy()
    )
    tokenizer = FullTokenizer()
    tokens = {text: tokenizer.tokenize(text) for text in TOKENS}
    strings = {text: tokenizer.convert_tokens_to_string(tokens[text]) for text in TOKENS}
    recorded = {
        "signatures": names,
        "half": half,
        "tokens": tokens,
        "strings": strings,
        "vocab_size": tokenizer.vocab_size(),
        "inv_vocab": {str(index): tokenizer.inv_vocab[index] for index in (0, 101, 4649)},
    }
    text = json.dumps(recorded, ensure_ascii=False, indent=1)
    (HERE / "official.json").write_text(text + "\n", encoding="utf-8")
    np.savez_compressed(HERE / "official.npz", **arrays)


if __name__ == "__main__":
    main()
