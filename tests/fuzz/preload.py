"""What the processes of the runner start with, so that a new one takes milliseconds."""

import warnings

warnings.simplefilter("ignore")

import lmdb  # noqa: E402, F401
import pyarrow.parquet  # noqa: E402, F401
import torch  # noqa: E402
from fuzz import readers  # noqa: E402, F401

import cn_clip.backends.torch  # noqa: E402
import cn_clip.cli  # noqa: E402
import cn_clip.convert  # noqa: E402
import cn_clip.data.curate.check  # noqa: E402
import cn_clip.data.pack  # noqa: E402
import cn_clip.train.loop  # noqa: E402, F401

torch.set_num_threads(1)
