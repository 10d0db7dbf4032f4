"""One tar shard, as WebDataset reads it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cn_clip.data.sources.tar import Sample


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Write a tar that WebDataset can read; the same samples give the same bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, sample in enumerate(samples):
            values: dict[str, Any] = {"image_id": sample.image_id}
            texts = [{"text_id": text_id, "text": text} for text_id, text in sample.texts]
            values |= {"texts": texts} if len(texts) > 1 else texts[0]
            members = {
                sample.suffix: sample.image,
                ".txt": sample.texts[0][1].encode(),
                ".json": json.dumps(values, ensure_ascii=False).encode(),
            }
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{number:08}{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
