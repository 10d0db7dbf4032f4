"""Texts without what all images of a set have in common."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cn_clip.model.clip import CLIP


@torch.no_grad()
def center_texts(model: CLIP, mean_image: Tensor) -> None:
    """Project a mean image embedding (D,) out of ``text_projection``, in place.

    The embeddings of a set of images share a component, and a text that has much of it is close
    to every image. Such texts are hubs (Radovanovic et al., "Hubs in Space", 2010): they rank high
    for images that they do not describe. After the projection no text feature has that component;
    image embeddings do not change.
    """
    projection = model.text_projection  # (W, D)
    direction = F.normalize(mean_image.to(projection), dim=0)
    projection.sub_(torch.outer(projection @ direction, direction))
