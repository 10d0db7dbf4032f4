"""The tests of ``tests/export``, in a process of their own.

They load ONNX Runtime, OpenVINO and torch together. As part of the whole suite, in one process with
a thousand other tests, that ended once in a segmentation fault; alone it never did.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "export"


@pytest.mark.parametrize(
    "marks", ["not full", pytest.param("full", marks=pytest.mark.full)], ids=["default", "full"]
)
def test_exports_in_a_process_of_their_own(marks):
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks, str(FOLDER)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode != -signal.SIGSEGV:
            break
        print(f"tests/export ended in a segmentation fault after:\n{done.stdout[-2000:]}")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
