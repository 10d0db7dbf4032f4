"""How the package was installed, and the commands that messages name."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import cn_clip
from cn_clip import install
from cn_clip.cli import run
from cn_clip.install import Installation, installation, recorded

ROOT = Path(__file__).parent.parent
GIT = {"url": "https://host/me/cn-clip.git", "vcs_info": {"vcs": "git", "commit_id": "abc123"}}
BRANCH = {**GIT, "vcs_info": {**GIT["vcs_info"], "requested_revision": "main"}}
WHEEL = {"url": "https://host/cn_clip-2.0-py3-none-any.whl", "archive_info": {}}


@pytest.fixture
def installed(monkeypatch):
    """Return a function that makes this the installation of the running package."""

    def use(record, version="2.0"):
        monkeypatch.setattr(install, "installation", lambda: recorded(record, version))

    return use


@pytest.mark.parametrize(
    ("record", "command"),
    [
        ({"url": "file://{here}", "dir_info": {"editable": True}}, "-e '{here}[data]'"),
        ({"url": "file://{here}", "dir_info": {}}, "'{here}[data]'"),
        ({"url": "file://{here}/a%20b.whl", "archive_info": {}}, "'{here}/a b.whl[data]'"),
        (WHEEL, f"'cn-clip[data] @ {WHEEL['url']}'"),
        (GIT, "'cn-clip[data] @ git+https://host/me/cn-clip.git@abc123'"),
        (BRANCH, "'cn-clip[data] @ git+https://host/me/cn-clip.git@main'"),
        ({}, "'cn-clip[data]==2.0'"),
    ],
    ids=["editable", "folder", "wheel", "wheel on the web", "commit", "branch", "index"],
)
def test_an_extra_is_installed_from_where_the_package_came(installed, tmp_path, record, command):
    (tmp_path / "a b.whl").touch()
    text = json.dumps(record).replace("{here}", str(tmp_path))
    installed(json.loads(text))
    expected = command.replace("{here}", str(tmp_path))
    assert install.install_command("data") == f"pip install {expected}"


def test_the_commands_are_arguments_that_pip_understands(installed):
    from packaging.requirements import Requirement

    for record in (WHEEL, GIT, BRANCH, {}):
        installed(record)
        quoted = install.install_command("data").removeprefix("pip install ")
        parsed = Requirement(quoted.strip("'"))
        assert parsed.name == "cn-clip" and parsed.extras == {"data"}


def test_a_wheel_that_was_removed_is_replaced_by_the_packages_of_the_extra(installed, monkeypatch):
    installed({"url": "file:///nowhere/cn_clip-2.0-py3-none-any.whl", "archive_info": {}})

    class Distribution:
        requires = ("torch>=2.6", "lmdb>=1.4; extra == 'data'", "pytest; extra == 'dev'")

    monkeypatch.setattr(install, "_own_distribution", Distribution)
    assert install.install_command("data") == "pip install 'lmdb>=1.4'"


def test_a_source_tree_on_the_path_is_a_clone():
    code = "from cn_clip.install import installation; print(installation())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(Path(cn_clip.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(Installation("clone", str(ROOT)))


def test_an_update_and_a_repair_never_fetch_another_package(installed, tmp_path):
    installed({"url": f"file://{tmp_path}", "dir_info": {"editable": True}})
    assert install.update_command() == f"git -C {tmp_path} pull"
    assert install.reinstall_command() == f"git -C {tmp_path} restore src/cn_clip/assets"
    installed(GIT)
    assert install.update_command().startswith("pip install -U 'cn-clip @ git+https://")
    installed({})
    assert install.update_command() == "pip install -U cn-clip"
    assert install.reinstall_command().endswith("--no-deps cn-clip==2.0")


def test_no_page_and_no_message_installs_an_extra_from_the_index():
    """``pip install 'cn-clip[data]'`` fetches the official package."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/**/*.*")]
    files += [*ROOT.glob("examples/**/*.md"), *(ROOT / "src").rglob("*.py")]
    wrong = [
        path.name
        for path in files
        if path.suffix in (".md", ".py", ".sh", ".txt")
        and re.search(r"pip install [^\n]*cn-clip\[", path.read_text(encoding="utf-8"))
        and path.name != "install.py"
    ]
    assert not wrong


def test_every_extra_that_a_message_names_exists():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = set()
    for path in (ROOT / "src").rglob("*.py"):
        named |= set(re.findall(r'install_command\("(\w+)"\)', path.read_text(encoding="utf-8")))
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        named |= set(re.findall(r"\.\[(\w+)\]", path.read_text(encoding="utf-8")))
    from cn_clip.cli.doctor import _EXTRAS

    assert named | set(_EXTRAS) <= set(project["optional-dependencies"])
    assert {"data", "eval", "serve"} <= named


def test_doctor_names_the_origin_and_the_extras(capsys, monkeypatch):
    real = __import__("importlib.util").util.find_spec
    doctor = import_module("cn_clip.cli.doctor")
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name: None if name == "lmdb" else real(name)
    )
    run(["doctor", "--offline", "--json"])
    findings = {f["what"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert installation().place in findings["cn-clip"]["detail"]
    assert findings["[data]"]["state"] == "note"
    assert "pip install" in findings["[data]"]["detail"]
    assert "[data]" in findings["[data]"]["detail"].partition("pip")[2]


def test_doctor_reports_the_official_package_beside_this_one(capsys, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.6.0")
    run(["doctor", "--offline", "--json"])
    details = [f["detail"] for f in json.loads(capsys.readouterr().out)["findings"]]
    assert any(detail.startswith("1.6.0 is installed too") for detail in details)
