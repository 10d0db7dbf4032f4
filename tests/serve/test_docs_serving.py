"""docs/serving.md: code the same in both languages, and true."""

import os
import re
import shlex
import shutil
import subprocess

import httpx
import openai
import pytest
from serve.servers import Settings, make_library, serving
from test_docs import DOCS, FENCE, ROOT, code_in, read

from cn_clip.cli import run

ENGLISH, CHINESE = DOCS / "serving.md", DOCS / "zh" / "serving.md"


def blocks(language):
    return [block for found, block in FENCE.findall(read(ENGLISH)) if found == language]


def test_both_languages_have_the_same_code_routes_and_figures():
    assert code_in(ENGLISH) == code_in(CHINESE)
    for pattern in (r"^\| (`[^|]+`) \|", r"--[a-z-]+", r"\b[\d,]{2,}\b"):
        found = [re.findall(pattern, read(page), re.MULTILINE) for page in (ENGLISH, CHINESE)]
        assert sorted(found[0]) == sorted(found[1]) and found[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    library = make_library(tmp_path_factory.mktemp("served"), "mini", 3)
    with serving(Settings(library=str(library), image_batch=1)) as client:
        yield client


def test_every_route_of_the_page_exists_and_every_route_is_on_it(server):
    rows = re.findall(r"^\| (`(?:GET|POST)[^|]+`) \|", read(ENGLISH), re.MULTILINE)
    named = {tuple(route.split()) for row in rows for route in re.findall("`([^`]+)`", row)}
    schema = server.get("/openapi.json").json()
    served = {
        (method.upper(), path.replace("{image}", "ID"))
        for path, operations in schema["paths"].items()
        for method in operations
    }
    of_the_page = {("POST", "/login"), ("POST", "/logout"), ("GET", "/session")}
    assert named == (served - of_the_page) | {("GET", "/openapi.json")}


def test_the_python_code_runs(server, monkeypatch, capsys):
    real = openai.OpenAI
    monkeypatch.chdir(ROOT)
    with httpx.Client(trust_env=False) as http:
        monkeypatch.setattr(
            openai,
            "OpenAI",
            lambda base_url, api_key: real(
                base_url=f"{server.base_url}/v1", api_key=api_key, http_client=http
            ),
        )
        scope = {}
        for block in blocks("python"):
            exec(compile(block, "docs/serving.md", "exec"), scope)
    assert len(scope["answer"].data) == 2
    assert capsys.readouterr().out.startswith("384 ")


def test_the_curl_lines_run(server, tmp_path):
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    (lines,) = (block for block in blocks("sh") if "curl" in block)
    for line in lines.splitlines():
        command = shlex.split(line.replace("localhost:8000", str(server.base_url)[7:]))
        command[1:1] = ["--fail", "--noproxy", "*"]
        done = subprocess.run(command, capture_output=True, cwd=tmp_path)
        assert done.returncode == 0, (line, done.stderr)
        assert done.stdout.startswith(b"{") or (tmp_path / "image.jpg").stat().st_size
    assert (tmp_path / "image.jpg").read_bytes().startswith(b"\xff\xd8")


def test_the_line_that_makes_a_key_works(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (line,) = re.findall(r"^cn-clip (serve .*--new-key \S+)", read(ENGLISH), re.MULTILINE)
    arguments = [part.replace("~", str(tmp_path)) for part in shlex.split(line)]
    assert run(arguments) == 0
    key = capsys.readouterr().out.strip()
    text = (tmp_path / ".config/cn_clip/keys").read_text()
    assert key.startswith("cnclip-") and key not in text and text.startswith("anna ")
    assert run(arguments) == 2 and "already" in capsys.readouterr().err
    assert os.environ["HOME"] == str(tmp_path)
