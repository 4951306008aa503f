"""The HTTP example: many clients at once, one session, and what is refused."""

import http.client
import io
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from examples import web_handler
from examples.web_handler import InversionHandler, InversionServer, png_from_pixels
from restyle_deploy import Session
from restyle_deploy.errors import DeviceError, VerificationError

CLIENTS = 8


@pytest.fixture(scope="module")
def session(toy_bundle: Path) -> Iterator[Session]:
    with Session.open(toy_bundle, threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def server(session: Session) -> Iterator[InversionServer]:
    server = InversionServer(("127.0.0.1", 0), session, threads=4)
    accepting = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    accepting.start()
    yield server
    server.shutdown()
    accepting.join()
    server.server_close()


def ask(server: InversionServer, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    try:
        connection.request(method, path, body=body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_clients_at_once_each_get_their_own_result(server: InversionServer, session: Session) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (CLIENTS, 32, 32, 3), np.uint8)
    steps = [1 + index % 3 for index in range(CLIENTS)]

    def post(index: int) -> tuple[int, bytes]:
        return ask(server, "POST", f"/invert?steps={steps[index]}", png_from_pixels(pictures[index]))

    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(post, range(CLIENTS)))
    for index, (status, content) in enumerate(answers):
        assert status == 200
        expected = session.invert(pictures[index][None], steps=steps[index], image_type="uint8")
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), expected.images[0])


def test_health_is_the_sessions_description(server: InversionServer, session: Session) -> None:
    status, content = ask(server, "GET", "/health")
    assert status == 200
    assert json.loads(content) == session.describe()


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "reason"),
    [
        ("POST", "/invert", b"no image", 400, "the body: not an image, or damaged"),
        ("POST", "/invert", b"", 400, "the body: empty file"),
        ("POST", "/invert?steps=0", b"", 400, "steps is '0', expected 1 to 50"),
        ("POST", "/invert?steps=many", b"", 400, "steps is 'many', expected 1 to 50"),
        ("POST", f"/invert?steps={'9' * 5000}", b"", 400, "steps is '99999999999999999999', expected 1 to 50"),
        ("POST", "/invert?steps=%D9%A3", b"", 400, "expected 1 to 50"),
        ("POST", "/other", b"", 404, "known are GET /health and POST /invert"),
        ("GET", "/", b"", 404, "known are GET /health and POST /invert"),
    ],
)
def test_what_is_refused(
    server: InversionServer, method: str, path: str, body: bytes, status: int, reason: str
) -> None:
    answer = ask(server, method, path, body)
    assert (answer[0], reason in answer[1].decode()) == (status, True), answer


def test_a_body_too_large_is_not_read(server: InversionServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_handler, "MOST_BYTES", 10)
    assert ask(server, "POST", "/invert", b"x" * 11) == (413, b"11 bytes, at most 10 are taken\n")


@pytest.mark.parametrize(
    ("length", "status", "reason"),
    [
        ("9" * 5000, 400, "Content-Length is '99999999999999999999', expected a number of bytes"),
        ("-1", 400, "Content-Length is '-1'"),
        (None, 411, "no Content-Length"),
    ],
)
def test_lengths_that_are_refused(server: InversionServer, length: str | None, status: int, reason: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    try:
        connection.putrequest("POST", "/invert")
        if length is not None:
            connection.putheader("Content-Length", length)
        connection.endheaders()
        response = connection.getresponse()
        assert (response.status, reason in response.read().decode()) == (status, True)
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (VerificationError("the image is not finite"), b"the image is not finite\n"),
        (DeviceError("cuda:0: out of memory"), b"cuda:0: out of memory\n"),
        (RuntimeError("a secret"), b"internal error; the server's log has it\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_errors_are_the_servers(
    server: InversionServer, session: Session, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: bytes
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(session, "invert", refuse)
    picture = png_from_pixels(np.zeros((8, 8, 3), np.uint8))
    assert ask(server, "POST", "/invert", picture) == (500, reason)


def test_a_client_that_falls_silent_is_hung_up_on(server: InversionServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InversionHandler, "timeout", 0.1)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as client:
        client.sendall(b"POST /invert HTTP/1.0\r\nContent-Length: 10\r\n\r\n")
        assert client.recv(100) == b""


def test_the_command_serves_until_interrupted(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(server: InversionServer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(InversionServer, "serve_forever", interrupt)
    result = CliRunner().invoke(web_handler.main, [str(toy_bundle), "--port", "0", "--threads", "1"])
    assert result.exit_code == 0
    assert "listening on http://127.0.0.1:" in result.stderr
    assert result.stderr.endswith("stopping\n")
