"""The model options of commands that use a library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cyclopts import Parameter

from cn_clip.cli.show import Flag
from cn_clip.config import BackendName, Precision

if TYPE_CHECKING:
    from cn_clip.embedder import Embedder
    from cn_clip.search.folder import LibraryFolder, StoredModel


@Parameter(name="*")
@dataclass(frozen=True)
class LibraryLoading:
    """The model of a library and how it runs.

    Parameters
    ----------
    model
        A name from `cn-clip models`, org/name on a hub, or the path of a checkpoint or an export.
        By default the library's own, and mini for a new library.
    backend
        torch, or the runtime of an export: onnx, openvino. auto: an export made by `cn-clip
        export`, if there is one, else torch.
    device
        cpu, cuda, mps, or auto.
    precision
        float32, bfloat16, float16, int8, or auto.
    fast_decode
        Decode large JPEG files at reduced size: faster, results differ slightly. For a new library.
    """

    model: str | None = None
    backend: BackendName = "auto"
    device: str = "auto"
    precision: Precision = "auto"
    fast_decode: Flag = False

    def load_named(self, name: str) -> Embedder:
        """Load a model with these options."""
        from cn_clip.embedder import load  # slow to import

        return load(
            name,
            backend=self.backend,
            device=self.device,
            precision=self.precision,
            fast_decode=self.fast_decode,
        )

    def load_own(self, library: LibraryFolder, model: StoredModel) -> Embedder:
        """Load the model of a library with these options."""
        from cn_clip.search.library_model import load_for

        return load_for(
            library,
            model,
            backend=self.backend,
            device=self.device,
            precision=self.precision,
        )


DEFAULT = LibraryLoading()
