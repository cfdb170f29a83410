"""Shared by tests of the served page: a running server, and photos to send to it."""

import io
import threading
from contextlib import contextmanager

from PIL import Image

from tools import serve

DECODING = {"max_length": 6, "device": "cpu", "precision": "fp32"}
STRANGE = "<img src=x onerror=alert(1)> & 猫.png"  # name of a photo


@contextmanager
def running(server):
    """Run a server in a thread."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def serve_run(run_folder, **settings):
    """Run a server of a run's best checkpoint with settings of tools/serve.py."""
    checkpoint = (str(run_folder / "best.pt"),)
    return running(serve.make_server(serve.Settings(checkpoint=checkpoint, port=0, **DECODING, **settings)))


def encode(photo, suffix, **options):
    """Encode a photo as the bytes of a file."""
    file = io.BytesIO()
    photo.save(file, {"jpg": "JPEG"}.get(suffix, suffix), **options)
    return file.getvalue()


def photo_files(folder):
    """Return 8 photos of a prepared folder as files of three formats, by name; EXIF turns the JPEGs in all 8 ways."""
    found = {}
    for i, path in enumerate(sorted((folder / "photos").glob("*.png"))[:8]):
        photo = Image.open(path).convert("RGB").resize((40 + i, 30))
        orientation = Image.Exif()
        orientation[0x0112] = 1 + i
        found[f"{i} ä.png"] = encode(photo, "png")
        found[f"{i}.jpg"] = encode(photo, "jpg", exif=orientation)
        found[f"{i}.gif"] = encode(photo, "gif")
    return found
