"""Write the files of this folder: tiny CLIP models as OpenAI's and open_clip's own code saves them.

    pip install clip-anytorch==2.6.0 open_clip_torch==3.3.0 "setuptools<80"
    python make.py

``openai_*.pt`` are TorchScript archives, as OpenAI published its models: traced, in float16.
``features.npz`` holds what each library's own image tower makes of ``images``, in float32.
"""

from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file

openai = import_module("clip.model")
HERE = Path(__file__).parent
TEXT = {"context_length": 8, "vocab_size": 64, "transformer_heads": 1, "transformer_layers": 1}

images = {
    side: torch.from_numpy(
        np.random.default_rng(side).normal(size=(2, 3, side, side)).astype(np.float32)
    )
    for side in (32, 64)
}
features = {f"images_{side}": batch.numpy() for side, batch in images.items()}


def redraw(model):
    """Draw every weight anew, so that none stays the 0 or 1 that hides a mistake."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        scale = 0.5 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            parameter.copy_(parameter.half())  # so that float16 files hold them exactly
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


for kind, side, layers, width, patch in (("vit", 32, 2, 64, 8), ("rn", 64, (1, 1, 1, 1), 8, None)):
    model = redraw(openai.CLIP(32, side, layers, width, patch, transformer_width=64, **TEXT))
    features[f"openai_{kind}"] = model.encode_image(images[side]).detach().numpy()
    openai.convert_weights(model)
    text = torch.ones(2, 8, dtype=torch.long)
    traced = torch.jit.trace_module(
        model,
        {"forward": (images[side], text), "encode_image": (images[side],), "encode_text": (text,)},
        check_trace=False,
    )
    traced.save(str(HERE / f"openai_{kind}.pt"))

vision = CLIPVisionCfg(layers=2, width=64, head_width=64, patch_size=8, image_size=32)
model = CLIP(32, vision, CLIPTextCfg(8, 64, width=64, heads=1, layers=1), quick_gelu=True)
redraw(model)
features["open_clip_vit"] = model.encode_image(images[32]).detach().numpy()
save_file(model.state_dict(), HERE / "open_clip_vit.safetensors")
np.savez_compressed(HERE / "features.npz", **features)
