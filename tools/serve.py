"""Caption photos on a page in the browser: python tools/serve.py --checkpoint best.pt

The server runs on this machine only and captions the photos that are dropped on the page.
"""

import contextlib
import json
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from decoding.captions import ImageCaption
from evaluation.consensus import load_captioning
from evaluation.ensemble import Ensemble, EnsembleSettings
from models import Captioner
from preparation.detection import Detector
from preparation.images import PhotoBytes, load_image, open_photo, pad_boxes, place_objects
from preparation.objects import objects_of_detections
from utils import InputError, choose_runtime, first_line, is_out_of_memory, require_needs, run_script, setting
from visualization.photos import open_for_picture
from visualization.report import Report, describe_caption, describe_photo

HOST = "127.0.0.1"  # other machines cannot reach it
MAX_UPLOAD = 32 * 2**20  # bytes of a photo's file
MAX_IGNORED = 2**30  # bytes to read from a refused request, so that the client can read the response
TIMEOUT = 30  # seconds without data after which a connection is closed
ROUTES = {"/": ("GET", "HEAD"), "/caption": ("POST",)}  # methods of each path


@dataclass(frozen=True, kw_only=True)
class Settings(EnsembleSettings):
    """Open a page in the browser where you can drop photos to see their captions."""

    # group: paths
    detect: str = ""  # a detector of torchvision for models that look at objects, such as fasterrcnn_resnet50_fpn_v2
    detector_weights: str = setting("coco", needs="detect")  # coco: downloaded; path of a state dict; empty: random

    # group: page
    port: int = setting(8000, minimum=0, maximum=65535)  # port of the page; 0: any free one

    NOT_FLAGS: ClassVar = ("batch_size",)  # photos come one at a time


@dataclass(frozen=True)
class CardMaker:
    """Captions a photo and describes it as a card of the report.

    Args:
        captioner: captioner in eval mode, or an ensemble; takes images.
        caption: captions a batch of images, as `evaluation.consensus.load_captioning` returns it.
        detector: finds the objects that the captioner looks at; None if it looks at none.
        seed: seed of each photo's samples.
    """

    captioner: Captioner | Ensemble
    caption: Callable[..., list[ImageCaption]]
    detector: Detector | None
    seed: int

    def __call__(self, photo: PhotoBytes) -> dict[str, Any]:
        """Return the card of a photo. Raises InputError if the photo cannot be read."""
        size = self.captioner.image_size, self.captioner.resize
        image, objects = torch.from_numpy(load_image(photo, *size)), []
        if self.detector:
            opened = open_photo(photo)
            objects = objects_of_detections(self.detector(opened), opened.size)
            objects = place_objects(objects, opened.size, *size)
        torch.manual_seed(self.seed)
        (caption,) = self.caption(image.unsqueeze(0), boxes=pad_boxes([objects]), with_heads=True)
        described = describe_caption(self.captioner, caption, objects)
        return describe_photo(photo.name, open_for_picture(photo, self.captioner.resize), [described])


class CaptionServer(ThreadingHTTPServer):
    """Serves the page, and the cards of the photos that it sends, one after the other.

    Args:
        page: the page as HTML.
        make_card: called with one photo at a time; the client receives its InputErrors.
        port: port of the page; 0: any free one.

    Raises InputError if the port is unavailable.
    """

    def __init__(self, page: str, make_card: Callable[[PhotoBytes], dict[str, Any]], port: int) -> None:
        self.page, self.make_card, self.lock = page.encode(), make_card, threading.Lock()
        self.is_ending = False
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise InputError(f"--port {port}: {error.strerror}: give another one, or 0 for any that is free") from None
        names = (HOST, "localhost")
        self.hosts = {f"{name}:{self.server_port}" for name in names}
        if self.server_port == 80:  # browsers leave this port out
            self.hosts |= set(names)

    @property
    def address(self) -> str:
        """Address of the page."""
        return f"http://{HOST}:{self.server_port}/"

    def run(self) -> None:
        """Serve until Ctrl-C."""
        try:
            self.serve_forever()
        finally:
            self.is_ending = True
            with self.lock:  # the program must not end while a thread computes
                self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the traceback of an error, unless the client has closed the connection."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class RequestError(Exception):
    """Error in a request; the answer is an HTTP status and one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """Answers GET / with the page and POST /caption, which sends a photo's bytes, with its card in JSON.

    The answer to anything else is a status and {"error": "one line"}. No path leads to the file system. Requests under
    another host name (DNS rebinding) or from another site's page are refused.
    """

    server: CaptionServer
    timeout = TIMEOUT
    default_request_version = "HTTP/1.0"  # so that even a request without a version gets a status

    def do_GET(self) -> None:
        """Answer a request."""
        try:
            self._check_host()
            if self.command == "POST":
                content, kind = json.dumps(self._card()).encode(), "application/json"
            else:
                content, kind = self.server.page, "text/html; charset=utf-8"
        except RequestError as error:
            self.send_error(error.status, str(error))
        except InputError as error:
            self.send_error(400, str(error))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.send_error(500, f"out of memory ({first_line(error)})")
        else:
            self._send(200, kind, content)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send {"error": message} with an HTTP status; http.server calls it for unreadable requests, too."""
        code = 405 if code == 501 else code  # a method without a do_ function
        error = {"error": " ".join(str(message).split())}
        self._send(code, "application/json", json.dumps(error).encode())
        self._ignore_rest()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": len(content), "Connection": "close"}
        headers |= {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
        headers["Content-Security-Policy"] = "frame-ancestors 'none'"  # a policy in the page cannot contain this
        if status == 405:
            headers["Allow"] = ", ".join(ROUTES.get(self.path, ()))
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _ignore_rest(self) -> None:
        """Read the rest of a request: closing the connection early would discard the answer."""
        self.close_connection = True
        ignored = 0
        with contextlib.suppress(OSError):  # the client has gone, or is silent
            self.connection.shutdown(socket.SHUT_WR)
            while ignored < MAX_IGNORED and (part := self.rfile.read1(2**16)):
                ignored += len(part)

    def _check_host(self) -> None:
        """Raise RequestError for another host, origin, path or method."""
        hosts, address = self.headers.get_all("Host", []), self.server.address
        if len(hosts) != 1 or hosts[0].lower() not in self.server.hosts:
            raise RequestError(403, f"another host: open {address}")
        origin = self.headers.get("Origin")
        if origin is not None and origin.removeprefix("http://") not in self.server.hosts:
            raise RequestError(403, f"a page of another origin: open {address}")
        if self.path not in ROUTES:
            raise RequestError(404, f"the only page is {address}")
        if self.command not in ROUTES[self.path]:
            raise RequestError(405, f"{self.command} is not a method of {self.path}: {' '.join(ROUTES[self.path])}")

    def _card(self) -> dict[str, Any]:
        """Return the card of the photo in the request's body; header X-Photo-Name: its name, percent-encoded."""
        name = " ".join(unquote(self.headers.get("X-Photo-Name", "")).split()) or "photo"
        length = self._length()
        content = self.rfile.read(length)
        if len(content) < length:
            raise RequestError(400, f"{name}: {len(content)} of {length} bytes arrived")
        with self.server.lock:  # covers the decoding of the photo, which may take a lot of memory
            if self.server.is_ending:
                raise RequestError(503, f"{name}: the server is ending")
            return self.server.make_card(PhotoBytes(name, content))

    def _length(self) -> int:
        """Return the length of the body in bytes. Raises RequestError if it is unknown or too large."""
        lengths = self.headers.get_all("Content-Length", [])
        if not lengths or "Transfer-Encoding" in self.headers:
            raise RequestError(411, "a photo needs a Content-Length, and no Transfer-Encoding")
        if len(lengths) > 1 or not (lengths[0].isascii() and lengths[0].isdecimal()):
            raise RequestError(400, f"Content-Length {', '.join(lengths)}: must be one number of bytes")
        if len(lengths[0]) > 15 or int(lengths[0]) > MAX_UPLOAD:  # Python refuses to read very long numbers
            raise RequestError(413, f"more than {MAX_UPLOAD // 2**20} MB: make the photo smaller")
        return int(lengths[0])


def make_server(settings: Settings) -> CaptionServer:
    """Load the model and return a server that is not running yet; InputError if the model cannot caption photos."""
    require_needs(settings)
    runtime = choose_runtime(settings.device, settings.precision)
    captioner, caption = load_captioning(settings, runtime)
    checkpoint = " ".join(settings.checkpoint)
    if captioner.uses_region_features:
        raise InputError(f"{checkpoint} looks at the region features of a detector, not at photos: use caption.py")
    if captioner.uses_objects and not settings.detect:
        raise InputError(f"{checkpoint} looks at objects: find them with --detect NAME")
    if settings.detect and not captioner.uses_objects:
        raise InputError(f"--detect {settings.detect}: the model does not look at objects, leave it out")
    detector = Detector(settings.detect, settings.detector_weights, runtime.device) if settings.detect else None
    report = Report("Image captioning", settings.checkpoint[:1], details={"checkpoint": checkpoint}, serve=True)
    return CaptionServer(report.page(), CardMaker(captioner, caption, detector, settings.seed), settings.port)


def main(settings: Settings) -> None:
    """Serve the page until Ctrl-C."""
    server = make_server(settings)
    print(f"serving at {server.address}, press Ctrl-C to stop", flush=True)
    server.run()


if __name__ == "__main__":
    run_script(main, Settings)
