"""tools/serve.py: captions are those of caption.py, refusals are one line, and no request causes harm."""

import http.client
import json
import random
import re
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest
from PIL import Image

import caption
from models import Captioner
from served_photos import DECODING, STRANGE, encode, running, serve_run
from tools import serve
from tools.serve import MAX_UPLOAD, CaptionServer, Handler
from utils import InputError
from visualization.report import describe_photo


@pytest.fixture
def quick_server():
    """A running server whose cards need no model; `asked` has the names of the photos sent to it."""
    asked, busy = [], threading.Lock()

    def make_card(photo):
        assert busy.acquire(blocking=False), "one photo at a time"
        time.sleep(0.01)
        asked.append(photo.name)
        busy.release()
        return {"name": photo.name, "bytes": len(photo.content)}

    with running(CaptionServer("<p>page", make_card, 0)) as server:
        server.asked = asked
        yield server


def ask(server, body=b"photo", method="POST", path="/caption", **headers):
    """Send a request; return the status and the content of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    return response.status, json.loads(content) if "json" in response.headers["Content-Type"] else content.decode()


def send(server, text):
    """Send bytes as they are; return the status and the line of the error, or None if there is no answer."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        connection.sendall(text.replace("HOST", f"Host: 127.0.0.1:{server.server_port}").encode())
        answer = b"".join(iter(lambda: connection.recv(2**16), b"")).decode()
    return (int(answer.split()[1]), json.loads(answer.splitlines()[-1])["error"]) if answer else None


def upload(server, name, content):
    """Send a photo; return the status and its card, or the error."""
    return ask(server, content, X_Photo_Name=quote(name))


def flags_of(settings):
    """Return settings as arguments of the command line."""
    return [argument for name, value in settings.items() for argument in (f"--{name}", value)]


BROKEN = {
    "text.txt": (b"A dog runs.", "text.txt: not a photo (JPEG,"),
    "empty.jpg": (b"", "empty.jpg: an empty file"),
    "cut.jpg": (encode(Image.effect_noise((64, 64), 50), "jpg")[:800], "cut.jpg: not a readable photo: "),
}


@pytest.mark.slow
def test_each_photo_is_captioned_as_by_caption_py_or_named(
    command, server, run_folder, sent_photos, tmp_path, monkeypatch
):
    for name, content in sent_photos.items():
        (tmp_path / name).write_bytes(content)
    arguments = ("--checkpoint", run_folder / "best.pt", "--no-pictures", "--json", "--batch_size", 1)
    status, out, _ = command(caption, tmp_path, *arguments, *flags_of(DECODING))
    expected = {row["file"].split("/")[-1]: row for row in map(json.loads, out.splitlines())}
    assert status == 0 and expected.keys() == sent_photos.keys()
    for folder in ("working", "temporary"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "working")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def check(name):
        if name in BROKEN:
            content, message = BROKEN[name]
            status, answer = upload(server, name, content)
            assert status == 400 and answer.keys() == {"error"} and answer["error"].startswith(message)
        else:
            status, card = upload(server, name, sent_photos[name])
            assert card.keys() == describe_photo(name, Image.new("RGB", (2, 2)), []).keys()  # as in a report
            (found,) = card["captions"]
            assert {"words", "log_prob", "n_best", "alpha", "cells", "boxes"} <= found.keys()
            assert status == 200 and card["name"] == name and " ".join(found["words"]) == expected[name]["caption"]
            assert found["log_prob"] == pytest.approx(expected[name]["log_prob"], abs=2e-3)

    for name in [*sent_photos, *BROKEN]:
        check(name)
    with ThreadPoolExecutor(10) as pool:  # ten at once
        list(pool.map(check, random.Random(0).choices([*sent_photos, *BROKEN], k=40)))
    status, answer = upload(server, "large.jpg", bytes(50 * 2**20))
    assert (status, answer) == (413, {"error": "more than 32 MB: make the photo smaller"})
    check(next(iter(sent_photos)))
    assert not [*(tmp_path / "working").iterdir(), *(tmp_path / "temporary").iterdir()]


def test_photos_wait_for_each_other(quick_server):
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda i: upload(quick_server, f"{i}", bytes(i + 1)), range(10)))
    assert answers == [(200, {"name": f"{i}", "bytes": i + 1}) for i in range(10)]


def test_the_page_sends_to_its_server_only(server):
    status, page = ask(server, None, "GET", "/")
    (policy,) = re.findall(r'Content-Security-Policy"\s+content="(.*?)">', page)
    assert status == 200 and "default-src 'none'; img-src data:; connect-src 'self';" in policy
    assert '"serve":true' in page
    assert ask(server, None, "HEAD", "/") == (200, "")


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LOCALHOST"])
def test_the_page_has_two_names(quick_server, name):
    host = f"{name}:{quick_server.server_port}"
    assert ask(quick_server, None, "GET", "/", Host=host)[0] == 200
    assert ask(quick_server, Host=host, Origin=f"http://{host.lower()}")[0] == 200


HEADERS = [{"Host": f"evil.example{port}"} for port in ("", ":PORT")]
HEADERS += [{"Host": name} for name in ("127.0.0.1", "127.0.0.1:1", "127.0.0.1.evil.example:PORT")]
HEADERS += [{"Origin": f"http://{name}"} for name in ("evil.example", "127.0.0.1:1")]
HEADERS += [{"Origin": "https://127.0.0.1:PORT"}, {"Origin": "null"}]


@pytest.mark.parametrize("headers", HEADERS, ids=lambda headers: str(*headers.items()))
def test_other_sites_are_refused(quick_server, headers):
    headers = {name: value.replace("PORT", str(quick_server.server_port)) for name, value in headers.items()}
    status, answer = ask(quick_server, **headers)
    assert status == 403 and answer["error"].endswith(f"open http://127.0.0.1:{quick_server.server_port}/")
    assert ask(quick_server, None, "GET", "/", **headers)[0] == 403 and not quick_server.asked


POST = "POST /caption HTTP/1.1\r\nHOST\r\n"
REQUESTS = [
    ("GET /../../etc/passwd HTTP/1.1\r\nHOST\r\n\r\n", 404, "the only page is http://127.0.0.1:"),
    ("GET /%2e%2e/caption.py HTTP/1.1\r\nHOST\r\n\r\n", 404, "the only page is"),
    ("POST /caption/x HTTP/1.1\r\nHOST\r\nContent-Length: 1\r\n\r\nx", 404, "the only page is"),
    ("GET /caption HTTP/1.1\r\nHOST\r\n\r\n", 405, "GET is not a method of /caption: POST"),
    ("POST / HTTP/1.1\r\nHOST\r\nContent-Length: 1\r\n\r\nx", 405, "POST is not a method of /: GET HEAD"),
    ("DELETE / HTTP/1.1\r\nHOST\r\n\r\n", 405, "Unsupported method ('DELETE')"),
    ("POST /caption HTTP/1.1\r\n\r\n", 403, "another host"),
    (f"{POST}HOST\r\nContent-Length: 1\r\n\r\nx", 403, "another host"),
    (f"{POST}\r\n", 411, "a photo needs a Content-Length"),
    (f"{POST}Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n", 411, "Content-Length, and no Transfer-Encoding"),
    (f"{POST}Content-Length: -1\r\n\r\n", 400, "Content-Length -1: must be one number"),
    (f"{POST}Content-Length: 1_0\r\n\r\n", 400, "Content-Length 1_0: must be one"),
    (f"{POST}Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx", 400, "Content-Length 1, 2: must be one"),
    (f"{POST}Content-Length: {MAX_UPLOAD + 1}\r\n\r\nx", 413, "more than 32 MB"),
    (f"{POST}Content-Length: {'9' * 5000}\r\n\r\nx", 413, "more than 32 MB"),
    ("no request\r\n\r\n", 400, "Bad HTTP/0.9 request type"),
]


@pytest.mark.parametrize(("request_text", "status", "message"), REQUESTS)
def test_requests_without_a_photo_are_answered_in_one_line(quick_server, monkeypatch, request_text, status, message):
    monkeypatch.setattr(Handler, "timeout", 0.5)
    found, error = send(quick_server, request_text)
    assert found == status and message in error and not quick_server.asked
    assert ask(quick_server)[0] == 200


def test_slow_and_broken_clients_stop_nobody(quick_server, monkeypatch, capsys):
    monkeypatch.setattr(Handler, "timeout", 0.5)
    beginnings = ["", "POST /cap", "POST /caption HTTP/1.1\r\nHOST\r\nContent-Length: 9\r\n\r\nhalf"]
    with ThreadPoolExecutor(len(beginnings)) as pool:
        silent = [pool.submit(send, quick_server, text) for text in beginnings]
        assert ask(quick_server)[0] == 200  # meanwhile
        assert [each.result() for each in silent] == [None] * 3
    with socket.create_connection(("127.0.0.1", quick_server.server_port)) as connection:
        text = f"POST /caption HTTP/1.1\r\nHost: 127.0.0.1:{quick_server.server_port}\r\nContent-Length: 9\r\n\r\nhalf"
        connection.sendall(text.encode())
        connection.shutdown(socket.SHUT_WR)
        assert b"photo: 4 of 9 bytes arrived" in b"".join(iter(lambda: connection.recv(2**16), b""))
    with socket.create_connection(("127.0.0.1", quick_server.server_port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset in place of an end
        connection.sendall(text.replace(": 9", ": 4").encode())
    assert ask(quick_server)[0] == 200 and "Traceback" not in capsys.readouterr().err


def test_an_error_of_the_model_is_answered(quick_server, capfd):
    def fail(error):
        def make_card(photo):
            raise error

        quick_server.make_card = make_card

    fail(InputError("a photo\nin two lines"))
    assert ask(quick_server) == (400, {"error": "a photo in two lines"})
    fail(MemoryError("of 9 GB"))
    assert ask(quick_server) == (500, {"error": "out of memory (of 9 GB)"})
    fail(RuntimeError("a bug"))
    with pytest.raises(http.client.RemoteDisconnected):
        ask(quick_server)
    assert "RuntimeError: a bug" in capfd.readouterr().err and ask(quick_server, None, "GET", "/")[0] == 200


def test_no_photo_begins_when_the_server_ends(quick_server):
    quick_server.is_ending = True
    assert ask(quick_server) == (503, {"error": "photo: the server is ending"}) and not quick_server.asked


def test_names_are_text_in_one_line(quick_server):
    for name, shown in ((STRANGE, STRANGE), ("a\r\n b", "a b"), ("\ud800", "photo"), (" ", "photo"), ("../a", "../a")):
        assert ask(quick_server, X_Photo_Name=quote(name, errors="ignore"))[1]["name"] == shown
    assert ask(quick_server)[1]["name"] == "photo"


def test_no_other_address_is_bound(quick_server):
    assert quick_server.server_address == ("127.0.0.1", quick_server.server_port)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", quick_server.server_port), timeout=2)


def test_the_address_is_printed_and_ctrl_c_ends_it(command, run_folder, monkeypatch):
    ports = []

    def serve_forever(server):
        ports.append(server.server_port)
        raise KeyboardInterrupt

    monkeypatch.setattr(CaptionServer, "serve_forever", serve_forever)
    status, out, err = command(serve, "--port", 0, "--checkpoint", run_folder / "best.pt")
    assert out == f"serving at http://127.0.0.1:{ports[0]}/, press Ctrl-C to stop\n"
    assert status == 130 and err == "\ninterrupted\n"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ports[0]), timeout=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.jpg",), "unrecognized arguments: a.jpg"),
        (("--batch_size", "2"), "unrecognized arguments: --batch_size 2"),
        (("--port", "65536"), "--port 65536: must be at most 65535"),
        (("--port", "-1"), "--port -1: must be at least 0"),
        (("--port", "USED"), ": give another one, or 0 for any that is free"),
        (("--detect", "x"), "--detect x: the model does not look at objects, leave it out"),
        (("--top_k", "2"), "--top_k 2 requires --samples"),
    ],
)
def test_wrong_settings_end_in_one_line(command, quick_server, run_folder, arguments, message):
    arguments = [argument.replace("USED", str(quick_server.server_port)) for argument in arguments]
    status, out, err = command(serve, *arguments, "--checkpoint", run_folder / "best.pt")
    assert status == 2 and message in err and err.count("\n") == 1 and not out


def test_models_of_region_features_take_no_photos(command, run_folder, monkeypatch):
    monkeypatch.setattr(Captioner, "uses_region_features", property(lambda captioner: True))
    status, _, err = command(serve, "--checkpoint", run_folder / "best.pt")
    assert status == 2 and "best.pt looks at the region features of a detector, not at photos" in err


@pytest.mark.slow
def test_a_detector_finds_the_objects_of_each_photo(command, objects_run, detector_weights, sent_photos, tmp_path):
    best, name = str(objects_run / "best.pt"), "fasterrcnn_mobilenet_v3_large_320_fpn"
    status, _, err = command(serve, "--checkpoint", best)
    assert status == 2 and err.endswith("best.pt looks at objects: find them with --detect NAME\n")
    detect = {"detect": name, "detector_weights": detector_weights}
    (tmp_path / "1.jpg").write_bytes(sent_photos["1.jpg"])
    arguments = ("--checkpoint", best, "--no-pictures", "--json", *flags_of(detect | DECODING))
    _, out, _ = command(caption, tmp_path / "1.jpg", *arguments)
    with serve_run(objects_run, **detect) as server:
        status, card = upload(server, "1.jpg", sent_photos["1.jpg"])
    (found,), expected = card["captions"], json.loads(out)
    assert status == 200 and found["cells"] == 16 and found["names"][:2] == ["", "dog"]
    assert " ".join(found["words"]) == expected["caption"]
    assert found["log_prob"] == pytest.approx(expected["log_prob"], abs=2e-3)


def test_samples_are_those_of_a_single_photo(run_folder, sent_photos):
    with serve_run(run_folder, samples=4, seed=3) as server:
        first, _, again = (upload(server, name, sent_photos[name])[1] for name in ("0.gif", "1.gif", "0.gif"))
    assert first == again and len(first["captions"][0]["n_best"]) > 1
