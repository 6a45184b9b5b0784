"""Tests of: dualtrain.export.revisions: each checkpoint of a run, and uploading it as a branch."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from dualtrain.cli import app
from dualtrain.common.errors import UserError

TOKEN = "hf_this_is_nobodys"


class StandInHub(BaseHTTPRequestHandler):
    """As much of the hub as uploading small files asks for; what came is in ``server.branches``."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "who are you?"})
        _, *path = self.path.removeprefix("/api").split("/")
        if path == ["repos", "create"]:
            return self.answer(200, {"url": f"{self.server.url}/me/model"})
        if path == ["validate-yaml"]:
            return self.answer(200, {"errors": [], "warnings": []})
        what, branch = path[3:5]
        if what == "branch":
            self.server.branches[branch] = {}
            return self.answer(200, {})
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular"} for f in files]
            return self.answer(200, {"files": [m | {"shouldIgnore": False} for m in modes]})
        assert what == "commit"
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.branches[branch][line["value"]["path"]] = content
        url = f"{self.server.url}/me/model/commit/1"
        return self.answer(200, {"commitUrl": url, "commitOid": "1", "hookOutput": ""})

    def answer(self, code, content):
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants, utils

    # The library keeps a session, which is one that refuses all where the hub was forbidden before.
    forget = getattr(utils, "reset_sessions", None) or utils.close_session
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandInHub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.branches = {"main": {}}
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    forget()
    yield server
    forget()
    server.shutdown()
    server.server_close()


def run(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_every_checkpoint_becomes_a_branch(cases, tmp_path, hub):
    """The linear run was to save when its first word is seen, at step 1, and at its end."""
    run_dir, to = cases["linear"].run_dir, tmp_path / "all"
    done = run(run_dir, "--to", to, "--all", "--dtype", "bf16", "--push", "me/model")
    assert done.exit_code == 0, done.output
    names = {"chck_0.000001M", "step-00000003", "main"}
    assert {place.name for place in to.iterdir()} == hub.branches.keys() == names
    assert f"pushed to {hub.url}/me/model/tree/chck_0.000001M" in done.output
    assert TOKEN not in done.output
    for name in names:
        here = {file.name: file.read_bytes() for file in (to / name).iterdir()}
        assert hub.branches[name] == here and "model.safetensors" in here
    weights = [hub.branches[name]["model.safetensors"] for name in ("chck_0.000001M", "main")]
    assert weights[0] != weights[1] == hub.branches["step-00000003"]["model.safetensors"]
    again = run(run_dir, "--to", to, "--all")
    assert again.output.count("is there already") == 3


def test_what_cannot_be_uploaded(cases, tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    run_dir = cases["linear"].run_dir
    refused = run(run_dir, "--to", tmp_path / "one", "--push", "me/model")
    assert isinstance(refused.exception, UserError)
    said = str(refused.exception)
    assert (
        said.startswith("--push me/model: the hub has not taken") and "hf upload me/model" in said
    )
    assert "hf_wrong" not in said and (tmp_path / "one" / "config.json").is_file()
    both = run(run_dir, "--to", tmp_path / "two", "--all", "--step", "3")
    assert "--step: is one checkpoint" in str(both.exception)
    nothing = run(tmp_path, "--to", tmp_path / "three", "--all")
    assert "has no whole checkpoint" in str(nothing.exception)
