"""The options of all commands that load a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cyclopts import Parameter

from cn_clip.cli.show import Flag
from cn_clip.config import BackendName, Precision

if TYPE_CHECKING:
    from cn_clip.embedder import Embedder


@Parameter(name="*")
@dataclass(frozen=True)
class Loading:
    """The model and how it runs.

    Parameters
    ----------
    model
        A name from `cn-clip models`, org/name on a hub, or the path of a checkpoint.
    backend
        torch, or the runtime of an export: onnx, openvino. auto: torch for a checkpoint, the
        fastest installed runtime for an export.
    device
        cpu, cuda, mps, or auto.
    precision
        float32, bfloat16, float16, int8, or auto.
    fast_decode
        Decode large JPEG files at reduced size: faster, results differ slightly.
    download_root
        The folder that is searched first for weights, and downloaded to.
    """

    model: str = "mini"
    backend: BackendName = "auto"
    device: str = "auto"
    precision: Precision = "auto"
    fast_decode: Flag = False
    download_root: str | None = None

    @property
    def paths(self) -> list[str]:
        """Input files and folders, which no output may overwrite."""
        return model_paths(self.model)

    def load(self, model: str | None = None) -> Embedder:
        """Load the model, or another one in the same way."""
        from cn_clip.embedder import load  # slow to import

        return load(
            model or self.model,
            backend=self.backend,
            device=self.device,
            precision=self.precision,
            fast_decode=self.fast_decode,
            download_root=self.download_root,
        )


def model_paths(*models: str | None) -> list[str]:
    """Return the models that are given as paths, not as names."""
    from cn_clip import hub

    names = hub.names()
    return [m for m in models if m is not None and m.replace("/", "-") not in names]


DEFAULT = Loading()
