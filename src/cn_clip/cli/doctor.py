"""``cn-clip doctor``: checks of the environment."""

from __future__ import annotations

import importlib.util
import platform
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Literal

from packaging.requirements import Requirement
from rich.cells import cell_len
from rich.markup import escape

from cn_clip import __version__, hub
from cn_clip.cli.show import Flag, console, print_json
from cn_clip.install import NAME, install_command, installation, other_version, reinstall_command
from cn_clip.translation import N_, _, translate

_TIMEOUT_S = 3.0
_CPU_INDEX = "--index-url https://download.pytorch.org/whl/cpu"
# extra -> what it is for, and the modules of its packages
_EXTRAS = {
    "data": (N_("Parquet and LMDB"), ("pyarrow", "lmdb")),
    "eval": (N_("traditional characters"), ("opencc",)),
    "search": (N_("large libraries, --watch"), ("numkong", "watchfiles")),
    "serve": (N_("the server"), ("fastapi", "uvicorn", "httptools", "prometheus_client")),
    "onnx": (N_("exports in ONNX Runtime"), ("onnxruntime",)),
    "openvino": (N_("exports in OpenVINO"), ("openvino",)),
    "export": (N_("writing exports"), ("onnx", "onnxscript", "onnxruntime")),
    "ocr": (N_("text in images"), ("rapidocr",)),
    "heif": (N_("HEIC images"), ("pillow_heif",)),
    "remote": (N_("training data in object stores"), ("obstore",)),
    "train": (N_("TensorBoard"), ("tensorboard",)),
    "modelscope": (N_("downloads from ModelScope"), ("modelscope",)),
}
_COLOURS = {N_("ok"): "green", N_("note"): "yellow", N_("fail"): "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check; only ``fail`` means that the environment is not ready."""

    what: str
    state: Literal["ok", "note", "fail"]
    detail: str


def doctor(
    *,
    offline: Flag = False,
    json: Flag = False,
) -> int:
    """Check that this environment is ready: versions, devices, the embedded model, the hubs.

    The exit code is 0 if everything required works, else 1. Something optional that is missing,
    such as a hub that cannot be reached, is a note.

    Parameters
    ----------
    offline
        Do not try to reach the hubs.
    json
        Print JSON instead of a list.
    """
    findings = []
    out = console()
    for finding in _check_all(offline):
        findings.append(finding)
        if not json:
            # Rich reads square brackets as markup; details may have some, as in cn-clip[extra].
            state = f"[{_COLOURS[finding.state]}]{_padded(finding.state, 6)}[/]"
            what = _padded(finding.what, 17)
            out.print(state + escape(f"{what}{finding.detail}"), soft_wrap=True)
    ready = all(finding.state != "fail" for finding in findings)
    if json:
        print_json({"ready": ready, "findings": [asdict(finding) for finding in findings]})
    else:
        out.print(_("ready") if ready else _("[red]not ready[/]: fix the checks marked fail"))
    return 0 if ready else 1


def _padded(message: str, width: int) -> str:
    """Translate a message, with spaces up to a width in cells: a Chinese character takes two."""
    text = translate(message)
    return text + " " * (width - cell_len(text))


def _check_all(offline: bool) -> Iterator[Finding]:
    yield from _package()
    requirements = _requirements()
    if requirements is None:
        yield Finding(
            N_("packages"),
            "note",
            _(
                "only torch is checked, because cn-clip is not installed; pip install -e {place}",
                place=installation().place,
            ),
        )
        requirements = [Requirement("torch")]
    required = [_check_package(requirement) for requirement in requirements]
    yield from required
    yield from _extras()
    if any(finding.state == "fail" for finding in required):
        return
    yield from _devices()
    yield _embedded_model()
    for name in hub.names()[1:]:
        path = hub.find(name)
        missing = _(
            "not on this machine; downloaded on first use, or put the file into {folder}",
            folder=hub.CACHE,
        )
        yield Finding(name, "ok" if path else "note", str(path or missing))
    if not offline:
        yield from _hubs()


def _package() -> Iterator[Finding]:
    """Report the version, and where it came from."""
    found = installation()
    origin = {
        "clone": _("from the source tree {place}", place=found.place),
        "folder": _("from the folder {place}", place=found.place),
        "file": _("from {place}", place=found.place),
        "repository": _("from {place}", place=found.place),
        "index": _("from a package index"),
    }[found.kind]
    yield Finding(
        NAME,
        "ok",
        _(
            "{version}, Python {python}, {origin}",
            version=__version__,
            python=platform.python_version(),
            origin=origin,
        ),
    )
    if other := other_version():
        yield Finding(
            NAME,
            "note",
            _(
                "{version} is installed too, and would be imported without PYTHONPATH; remove it "
                "with: pip uninstall cn-clip",
                version=other,
            ),
        )


def _extras() -> Iterator[Finding]:
    for extra, (purpose, modules) in _EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        detail = translate(purpose)
        if missing:
            detail = _(
                "not installed; for {purpose}: {command}",
                purpose=detail,
                command=install_command(extra),
            )
        yield Finding(f"[{extra}]", "note" if missing else "ok", detail)


def _requirements() -> list[Requirement] | None:
    """Return the requirements without extras; None if the package is not installed."""
    try:
        requirements = map(Requirement, metadata.requires("cn-clip") or [])
    except metadata.PackageNotFoundError:
        return None
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def _check_package(requirement: Requirement) -> Finding:
    version = _version(requirement.name)
    if version and requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, "ok", version)
    problem = _("{version} is too old", version=version) if version else _("missing")
    remedy = f"pip install '{requirement}'"
    if requirement.name == "torch":
        remedy += _(", or for the CPU alone: {command}", command=f"{remedy} {_CPU_INDEX}")
    return Finding(
        requirement.name,
        "fail",
        _("{problem}; install it: {remedy}", problem=problem, remedy=remedy),
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    import torch

    threads = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding(
        "cpu",
        "ok",
        _(
            "{capability}, {threads} threads; float32, bfloat16, float16",
            capability=capability,
            threads=threads,
        ),
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            precisions = "float32, float16" + (
                ", bfloat16" if torch.cuda.is_bf16_supported() else ""
            )
            yield Finding(f"cuda:{index}", "ok", f"{properties.name}, {memory}; {precisions}")
    elif torch.backends.mps.is_available():
        yield Finding("mps", "ok", _("Apple GPU; float32, float16"))
    else:
        yield Finding(
            "gpu",
            "note",
            _("none that torch {version} can use; the CPU works", version=torch.__version__),
        )


def _embedded_model() -> Finding:
    """Load `mini`, and check its embeddings of three texts and an image."""
    import numpy as np

    from cn_clip.embedder import load

    try:
        start = time.perf_counter()
        embedder = load(hub.EMBEDDED, device="cpu")
        seconds = time.perf_counter() - start
        cat, kitten, rocket = embedder.embed_texts(["猫", "小猫", "火箭"])
        image = embedder.embed_images(np.full((64, 64, 3), 128, dtype=np.uint8))
        works = cat @ kitten > cat @ rocket and abs(float(np.linalg.norm(image)) - 1) < 1e-3
    except Exception as error:  # report any error
        return Finding(
            N_("embedded model"),
            "fail",
            _("{error}; restore it: {command}", error=error, command=reinstall_command()),
        )
    if not works:
        return Finding(
            N_("embedded model"),
            "fail",
            _("wrong embeddings; restore it: {command}", command=reinstall_command()),
        )
    return Finding(
        N_("embedded model"),
        "ok",
        _("{model} loads in {seconds:.2f} s and works", model=hub.EMBEDDED, seconds=seconds),
    )


def _hubs() -> Iterator[Finding]:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Finding("Hugging Face", "note", _("not checked: HF_HUB_OFFLINE is set"))
    else:
        yield _check_hub("Hugging Face", constants.ENDPOINT)
    yield _check_hub("ModelScope", hub.modelscope_endpoint())


def _check_hub(name: str, endpoint: str) -> Finding:
    request = urllib.request.Request(endpoint, method="HEAD", headers={"User-Agent": "cn-clip"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S):
            pass
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            return Finding(
                name,
                "note",
                _("{endpoint} answers {code}; try again later", endpoint=endpoint, code=error.code),
            )
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Finding(
            name,
            "note",
            _(
                "{endpoint} cannot be reached ({reason}); mini needs no hub",
                endpoint=endpoint,
                reason=reason,
            ),
        )
    return Finding(name, "ok", _("{endpoint} answers", endpoint=endpoint))
