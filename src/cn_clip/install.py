"""How this package was installed, and the commands that add an extra or update it.

``pip install 'cn-clip[data]'`` would fetch another version from the package index if this one came
from a clone, a file or a repository. pip records where a package came from in ``direct_url.json``
(PEP 610).
"""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:  # slow to import
    from importlib.metadata import Distribution

NAME = "cn-clip"
_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Installation:
    """Where the running package came from.

    Attributes:
        kind: ``clone`` is a source tree that is imported where it is (``pip install -e``, or
            ``PYTHONPATH``), ``folder`` a source tree that was copied, ``file`` a wheel or an
            archive, ``repository`` a URL of a version control system, ``index`` a package index.
        place: the folder, file or URL; the version for an index.
    """

    kind: Literal["clone", "folder", "file", "repository", "index"]
    place: str

    @property
    def is_gone(self) -> bool:
        """Whether the folder or file was removed after the installation."""
        is_path = self.kind in ("clone", "folder", "file") and "://" not in self.place
        return is_path and not os.path.exists(self.place)

    def requirement(self, extra: str | None = None) -> str:
        """Return what ``pip install`` takes to install the same package with an extra."""
        extras = f"[{extra}]" if extra else ""
        if self.kind == "index":
            return f"{NAME}{extras}=={self.place}"
        if self.kind == "repository" or re.match(r"https?:", self.place):
            return f"{NAME}{extras} @ {self.place}"
        return f"{self.place}{extras}"


def install_command(extra: str) -> str:
    """Return the command that installs an extra beside this package."""
    found = installation()
    if found.is_gone:
        return _words("pip", "install", *_packages_of(extra))
    return _pip(found, extra)


def update_command() -> str:
    """Return the command that installs the newest version from where this one came."""
    found = installation()
    if found.kind == "clone":
        return f"git -C {shlex.quote(found.place)} pull"
    if found.kind == "index":
        return f"pip install -U {NAME}"
    return _pip(found, None, "-U")


def reinstall_command() -> str:
    """Return the command that restores the files of this package."""
    found = installation()
    if found.kind == "clone":
        return f"git -C {shlex.quote(found.place)} restore src/cn_clip/assets"
    return _pip(found, None, "--force-reinstall", "--no-deps")


@cache
def installation() -> Installation:
    """Find out where the running package came from."""
    distribution = _own_distribution()
    if distribution is not None:
        return recorded(_direct_url(distribution), distribution.version)
    clone = _PACKAGE.parent.parent
    if _PACKAGE.parent.name == "src" and (clone / "pyproject.toml").is_file():
        return Installation("clone", str(clone))  # on PYTHONPATH
    return Installation("index", _version())


def other_version() -> str | None:
    """Return the version of an installed distribution of this name that is not what runs.

    The official package has the same name.
    """
    from importlib import metadata

    try:
        version = metadata.version(NAME)
    except metadata.PackageNotFoundError:
        return None
    return None if version == _version() else version


def recorded(record: dict[str, Any], version: str) -> Installation:
    """Return the installation that a ``direct_url.json`` describes; empty for an index."""
    url = str(record.get("url", ""))
    if not url:
        return Installation("index", version)
    if isinstance(vcs := record.get("vcs_info"), dict):
        revision = vcs.get("requested_revision") or vcs.get("commit_id") or ""
        at = f"@{revision}" if revision else ""
        return Installation("repository", f"{vcs.get('vcs', 'git')}+{url}{at}")
    path = _local(url) if url.startswith("file:") else url
    if "dir_info" in record:
        editable = bool((record["dir_info"] or {}).get("editable"))
        return Installation("clone" if editable else "folder", path)
    return Installation("file", path)


def _own_distribution() -> Distribution | None:
    """Return the installed distribution that the running code belongs to."""
    from importlib import metadata

    try:
        distribution = metadata.distribution(NAME)
    except metadata.PackageNotFoundError:
        return None
    found = recorded(_direct_url(distribution), distribution.version)
    sources = Path(found.place, "src") if found.kind == "clone" else distribution.locate_file("")
    return distribution if os.path.realpath(f"{sources}/cn_clip") == str(_PACKAGE) else None


def _local(url: str) -> str:
    """Return the path of a ``file:`` URL."""
    path = unquote(urlsplit(url).path)
    return path.lstrip("/") if os.name == "nt" else path


def _direct_url(distribution: Distribution) -> dict[str, Any]:
    try:
        record = json.loads(distribution.read_text("direct_url.json") or "{}")
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _packages_of(extra: str) -> list[str]:
    """Return the requirements of an extra, from the metadata of this package."""
    distribution = _own_distribution()
    requirements = (distribution.requires if distribution else None) or []
    parts = (requirement.partition(";") for requirement in requirements)
    return [name for name, _, marker in parts if re.search(rf"""['"]{extra}['"]""", marker)]


def _pip(found: Installation, extra: str | None, *options: str) -> str:
    editable = ["-e"] if found.kind == "clone" else []
    return _words("pip", "install", *options, *editable, found.requirement(extra))


def _words(*words: str) -> str:
    """Join words for a shell; quotes are needed for brackets and comparisons."""
    return " ".join(
        word if re.fullmatch(r"[\w@%+=:,./-]+", word) else f"'{word}'" for word in words
    )


def _version() -> str:
    from cn_clip import __version__

    return __version__
