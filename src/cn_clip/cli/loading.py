"""The options by which verbs load a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cyclopts import Parameter

from cn_clip.cli.show import Flag
from cn_clip.config import Precision

if TYPE_CHECKING:
    from cn_clip.embedder import Embedder


@Parameter(name="*")
@dataclass(frozen=True)
class Loading:
    """Which model, and how it runs.

    Parameters
    ----------
    model
        A name from `cn-clip models`, org/name on a hub, or the path of a checkpoint.
    device
        cpu, cuda, mps, or auto.
    precision
        float32, bfloat16, float16, or auto.
    fast_decode
        Decode large JPEG files at reduced size: faster, results differ slightly.
    download_root
        Where official weights are looked for, and downloaded to.
    """

    model: str = "mini"
    device: str = "auto"
    precision: Precision = "auto"
    fast_decode: Flag = False
    download_root: str | None = None

    @property
    def paths(self) -> list[str]:
        """What is read of one's own files, so that no output may touch it."""
        return model_paths(self.model)

    def load(self, model: str | None = None) -> Embedder:
        """Load the model, or another one in the same way."""
        from cn_clip.embedder import load  # not before: it waits for numpy

        return load(
            model or self.model,
            device=self.device,
            precision=self.precision,
            fast_decode=self.fast_decode,
            download_root=self.download_root,
        )


def model_paths(*models: str | None) -> list[str]:
    """Return those of some models that are given by a path, not by a name."""
    from cn_clip import hub

    named = hub.names()
    return [each for each in models if each is not None and each.replace("/", "-") not in named]


DEFAULT = Loading()
