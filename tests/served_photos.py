"""What tests of the served page share: a server that runs meanwhile, and photos to send to it."""

import io
import threading
from contextlib import contextmanager

from PIL import Image

import caption

DECODING = {"max_length": 6, "device": "cpu", "precision": "fp32"}
STRANGE = "<img src=x onerror=alert(1)> & 猫.png"  # a name of a photo


@contextmanager
def running(server):
    """A server that answers meanwhile."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def serve_run(run_folder, **settings):
    """A running server of a run, with settings of caption.py."""
    checkpoint = (str(run_folder / "best.pt"),)
    return running(caption.make_server(caption.Settings((), checkpoint, serve=True, port=0, **DECODING, **settings)))


def encode(photo, suffix, **options):
    """A photo as the bytes of a file."""
    file = io.BytesIO()
    photo.save(file, {"jpg": "JPEG"}.get(suffix, suffix), **options)
    return file.getvalue()


def photo_files(folder):
    """The files of a prepared folder's first 12 photos by their names.

    They have three formats, the JPEGs are turned by their EXIF orientation.
    """
    found = {}
    for i, path in enumerate(sorted((folder / "photos").glob("*.png"))[:12]):
        photo = Image.open(path).convert("RGB").resize((40 + i, 30))
        orientation = Image.Exif()
        orientation[0x0112] = 1 + i % 8
        found[f"{i} ä.png"] = encode(photo, "png")
        found[f"{i}.jpg"] = encode(photo, "jpg", exif=orientation)
        found[f"{i}.gif"] = encode(photo, "gif")
    return found
