"""What counts as no way to the hub: no connection, and nothing else."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import close_session, constants

from lorikeet import hub


@pytest.fixture
def closed() -> Iterator[int]:
    """A port that is ours and that nobody listens at."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    yield monkeypatch
    close_session()


def test_no_connection(endpoint: pytest.MonkeyPatch, closed: int) -> None:
    address = f"http://127.0.0.1:{closed}"
    endpoint.setattr(constants, "ENDPOINT", address)
    reason = hub.unreachable()
    assert reason is not None
    assert reason.startswith(f"{address} cannot be reached (")
    assert "refused" in reason


@pytest.mark.parametrize("status", [200, 404, 503])
def test_any_answer_will_do(endpoint: pytest.MonkeyPatch, status: int) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        endpoint.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub.unreachable() is None


def test_slow_is_not_out_of_reach(endpoint: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        endpoint.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
        assert hub.unreachable() is None


def test_who_is_offline_is_not_asked(endpoint: pytest.MonkeyPatch, closed: int) -> None:
    endpoint.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed}")
    endpoint.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.unreachable() is None
