"""Uploads, to a local server that answers as the hub does as far as its client asks."""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from lorikeet import api
from lorikeet.adapters import Adapter, Update, read_adapter, write_adapter
from lorikeet.adapters.hub import push_to_hub
from lorikeet.cli.main import main
from lorikeet.errors import AdapterError, ConfigError, LorikeetError


@dataclass
class Hub:
    """What was asked of the server, and how it answers.

    Attributes:
        url: its address.
        requests: method and path of every request.
        created: bodies of the requests for a repository.
        commits: by commit, what its files hold by name.
        tokens: the header `authorization` by path.
        refusals: status code by the beginning of a path.
    """

    url: str = ""
    requests: list[str] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    commits: list[dict[str, bytes]] = field(default_factory=list)
    tokens: dict[str, str | None] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        self.requests.append(f"{method} {path}")
        for start, status in self.refusals.items():
            if path.startswith(start):
                found = {"error": f"refused with {status}"}
                if status == 409:  # it is there already, and this is where
                    found["url"] = f"{self.url}/someone/{json.loads(body)['name']}"
                return status, found
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.created.append(asked)
            owner = asked.get("organization", "someone")
            return 200, {"url": f"{self.url}/{owner}/{asked['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/commit/main", path):
            lines = [json.loads(line) for line in body.splitlines()]
            sent = [line["value"] for line in lines if line["key"] == "file"]
            assert {line["key"] for line in lines} == {"header", "file"}
            self.commits.append({f["path"]: base64.b64decode(f["content"]) for f in sent})
            name = path.removeprefix("/api/models/").split("/commit")[0]
            commit = {"commitUrl": f"{self.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}
            return 200, {"success": True, **commit}
        return 404, {"error": "no such page"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self._serve()

        def do_GET(self) -> None:
            self._serve()

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            made.tokens[self.path] = self.headers.get("authorization")
            status, found = made.answer(self.command, self.path, body)
            text = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    # The client reads HF_ENDPOINT and its like once, when it is imported.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", made.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield made
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    update = Update(torch.randn(2, 6), torch.randn(4, 2), 0.5)
    write_adapter(Adapter({"model.layers.0.q_proj": update}, base_model="org/base"), folder)
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# mine\n")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def is_private(created: dict[str, Any]) -> bool:
    """Whether a private repository was asked for, in the words of hub clients old and new."""
    return created.get("private") is True or created.get("visibility") == "private"


def test_an_adapter_arrives_as_it_is(hub: Hub, adapter: Path) -> None:
    assert push_to_hub(adapter, "someone/mine", token="hf_secret") == f"{hub.url}/someone/mine"
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("someone", "mine")
    assert not is_private(created)
    for path in ("/api/repos/create", "/api/models/someone/mine/commit/main"):
        assert hub.tokens[path] == "Bearer hf_secret"
    (sent,) = hub.commits
    assert sent == {path.name: path.read_bytes() for path in adapter.iterdir()}


def test_only_the_adapters_own_files_are_sent(hub: Hub, adapter: Path) -> None:
    (adapter / "diary.txt").write_text("mine alone")
    (adapter / ".env").write_text("TOKEN=1")
    (adapter / "adapter_model.bin").write_bytes(b"an old pickle")
    (adapter / "sub").mkdir()
    (adapter / "sub" / "tokenizer.json").write_text("{}")
    api.push_to_hub(str(adapter), "someone/mine", private=True)
    (sent,) = hub.commits
    assert set(sent) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    }
    assert is_private(hub.created[0])


def test_what_is_uploaded_reads_back(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    push_to_hub(adapter, "someone/mine")
    for name, content in hub.commits[0].items():
        (tmp_path / "back").mkdir(exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content)
    ours, theirs = read_adapter(adapter), read_adapter(tmp_path / "back")
    assert ours.updates.keys() == theirs.updates.keys()
    for name, update in ours.updates.items():
        assert torch.equal(update.delta(), theirs.updates[name].delta())


def test_a_repository_that_is_there_takes_another_commit(hub: Hub, adapter: Path) -> None:
    hub.refusals["/api/repos/create"] = 409
    push_to_hub(adapter, "someone/mine")
    assert len(hub.commits) == 1


def refusal(folder: Path, repo: str = "someone/mine") -> str:
    with pytest.raises(LorikeetError) as error:
        push_to_hub(folder, repo)
    return str(error.value)


@pytest.mark.parametrize("step", ["/api/repos/create", "/api/models/someone/mine/"])
@pytest.mark.parametrize(("status", "said"), [(401, "hf auth login"), (403, "may not write")])
def test_no_login_and_no_right(hub: Hub, adapter: Path, step: str, status: int, said: str) -> None:
    hub.refusals[step] = status
    message = refusal(adapter)
    assert said in message
    assert "HF_TOKEN" in message
    assert hub.commits == []


def test_another_refusal_gives_the_hubs_words(hub: Hub, adapter: Path) -> None:
    hub.refusals["/api/models/someone/mine/commit"] = 400
    message = refusal(adapter)
    assert "someone/mine" in message
    assert "refused with 400" in message


@pytest.mark.parametrize("name", ["", "a/b/c", "a b", "a/..", "-a/b", "a/b.git", "../secret"])
def test_a_name_that_cannot_be(hub: Hub, adapter: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a repository's name"):
        push_to_hub(adapter, name)
    assert hub.requests == []


def test_a_broken_adapter_is_not_sent(hub: Hub, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(AdapterError, match="damaged"):
        push_to_hub(adapter, "someone/mine")
    assert hub.requests == []


def test_a_link_out_of_the_folder_is_not_sent(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine alone")
    (adapter / "vocab.json").symlink_to(tmp_path / "secret")
    assert "link out of the adapter folder" in refusal(adapter)
    assert hub.requests == []


def test_nobody_answers(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    message = refusal(adapter)
    assert f"cannot reach http://127.0.0.1:{port}" in message


def test_offline_mode(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(adapter)
    assert hub.requests == []


def test_what_others_will_miss_is_said(
    hub: Hub, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push_to_hub(adapter, "someone/mine")
    assert capsys.readouterr().err == ""
    (adapter / "README.md").unlink()
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace("org/base", "/home/me/base"))
    push_to_hub(adapter, "someone/mine")
    said = capsys.readouterr().err
    assert "has no README.md" in said
    assert "/home/me/base, which is no hub id" in said


@pytest.mark.parametrize(
    ("flags", "shown"),
    [([], str), (["--json"], lambda text: json.loads(text)["url"])],
    ids=["text", "json"],
)
def test_the_verb(
    hub: Hub,
    adapter: Path,
    flags: list[str],
    shown: Callable[[str], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = str(adapter.parent)  # a run folder holds its adapter in `adapter`
    assert main(["adapter", "push", run, "someone/mine", "--private", *flags]) == 0
    assert shown(capsys.readouterr().out).strip() == f"{hub.url}/someone/mine"
    assert is_private(hub.created[0])
    assert main(["adapter", "push", run, "some one"]) == 2
    assert "error: 'some one' cannot be" in capsys.readouterr().err
