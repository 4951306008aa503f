"""Serve a bundle over HTTP: a pool of threads, and one session that all of them share.

    python -m examples.web_handler engines/demo-faces --port 8000
    curl --data-binary @examples/photos/grace-hopper.png "127.0.0.1:8000/invert?steps=5" -o inverted.png

POST /invert takes an image file and answers with the inverted one as PNG; GET /health says what runs. Decoding,
resizing and encoding go on in all threads at once; the session puts their inversions in order. Meant to be read: a
public service wants TLS and limits of its own in front.
"""

import io
import json
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from restyle_deploy import Session
from restyle_deploy.errors import ImageError, RestyleDeployError
from restyle_deploy.runtime.images import load_image

MOST_BYTES = 2**25
MOST_PIXELS = 2**25
MOST_STEPS = 50
MOST_DIGITS = 18  # of a number; Python refuses to read very long ones
SECONDS_OF_SILENCE = 30  # after which a client's connection is given up


class RequestError(Exception):
    """A request that is refused with a status and one line."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class InversionServer(HTTPServer):
    """An HTTP server whose connections are served by the threads of a pool. Close it before the session."""

    def __init__(self, address: tuple[str, int], session: Session, *, threads: int) -> None:
        """Listen.

        Args:
            address: host and port; port 0 for any that is free.
            session: that all threads call; it stays the caller's.
            threads: requests served at once; others wait in the pool's queue.
        """
        super().__init__(address, InversionHandler)
        self.session = session
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="request")

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hand a connection to the pool; the thread that accepts goes on accepting."""
        self._pool.submit(self._serve, request, client_address)

    def server_close(self) -> None:
        """Stop listening, and wait for the requests that were accepted."""
        super().server_close()
        self._pool.shutdown()

    def _serve(self, request: Any, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except Exception:  # of one connection, which may have gone away; the others are served
            self.handle_error(request, client_address)
        finally:
            self.shutdown_request(request)


class InversionHandler(BaseHTTPRequestHandler):
    """One request, in a thread of the pool."""

    server: InversionServer
    timeout = SECONDS_OF_SILENCE

    def do_GET(self) -> None:
        """Say what runs."""
        if urlsplit(self.path).path != "/health":
            self._refuse(HTTPStatus.NOT_FOUND, "known are GET /health and POST /invert")
            return
        content = json.dumps(self.server.session.describe()).encode()
        self._answer(HTTPStatus.OK, "application/json", content)

    def do_POST(self) -> None:
        """Invert the image file in the body."""
        try:
            if urlsplit(self.path).path != "/invert":
                raise RequestError(HTTPStatus.NOT_FOUND, "known are GET /health and POST /invert")
            steps = steps_from_query(parse_qs(urlsplit(self.path).query))
            picture = self._read_picture()
            result = self.server.session.invert(picture[None], steps=steps, image_type="uint8")
        except RequestError as error:
            self._refuse(error.status, str(error))
        except RestyleDeployError as error:  # of the model or the device
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
        except (ConnectionError, TimeoutError):  # of the client, to whom nothing can be said; the base class hangs up
            raise
        except Exception:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; the server's log has it")
            raise
        else:
            self._answer(HTTPStatus.OK, "image/png", png_from_pixels(result.images[0]))

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log to stderr, as the base class does, without the client's address."""
        click.echo(format % arguments, err=True)

    def _read_picture(self) -> NDArray[np.uint8]:
        text = self.headers.get("Content-Length", "")
        if not text:
            raise RequestError(HTTPStatus.LENGTH_REQUIRED, "no Content-Length")
        length = whole_number(text)
        if length is None:
            raise RequestError(HTTPStatus.BAD_REQUEST, f"Content-Length is {text[:20]!r}, expected a number of bytes")
        if length > MOST_BYTES:
            raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{length} bytes, at most {MOST_BYTES} are taken")
        with tempfile.NamedTemporaryFile(prefix="upload-") as file:
            file.write(self.rfile.read(length))
            file.flush()
            try:
                return load_image(Path(file.name), max_pixels=MOST_PIXELS)
            except ImageError as error:
                reason = str(error).removeprefix(f"{file.name}: ")
                raise RequestError(HTTPStatus.BAD_REQUEST, f"the body: {reason}") from error

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self._answer(status, "text/plain; charset=utf-8", f"{reason}\n".encode())

    def _answer(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def steps_from_query(query: Mapping[str, list[str]]) -> int | None:
    """Return the steps that a query asks for, None where it asks for none; raise `RequestError` for others."""
    (text,) = query.get("steps", [""])[-1:]
    if not text:
        return None
    steps = whole_number(text)
    if steps is None or not 1 <= steps <= MOST_STEPS:
        raise RequestError(HTTPStatus.BAD_REQUEST, f"steps is {text[:20]!r}, expected 1 to {MOST_STEPS}")
    return steps


def whole_number(text: str) -> int | None:
    """Return the number that decimal digits make; None for other text, and for more digits than a size has."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS else None


def png_from_pixels(pixels: NDArray[np.uint8]) -> bytes:
    """Return [H, W, 3] as the content of a PNG file."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG", compress_level=1)
    return content.getvalue()


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--backend", help="A row of restyle_deploy.backends.BACKENDS.")
@click.option("--device", help="cpu, or cuda:0 and so on.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option("--threads", default=8, show_default=True, type=click.IntRange(min=1), help="Requests served at once.")
def main(bundle: Path, backend: str | None, device: str | None, host: str, port: int, threads: int) -> None:
    """Serve until interrupted."""
    try:
        session = Session.open(bundle, backend=backend, device=device)
    except RestyleDeployError as error:
        raise click.ClickException(str(error)) from None
    with session:
        server = InversionServer((host, port), session, threads=threads)
        click.echo(f"listening on http://{host}:{server.server_port}", err=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            click.echo("stopping", err=True)
        finally:
            server.server_close()


if __name__ == "__main__":
    main()
