"""The preview of a prepared folder."""

import numpy as np
from PIL import Image

import create_input_files


def test_preview_plots_photos_and_words(command, shapes):
    status, out, err = command(create_input_files, "--preview", shapes)
    assert status == 0, err
    for name in ("contact_sheet.png", "words.png"):
        with Image.open(shapes / name) as picture:
            assert str(shapes / name) in out and picture.width > 500 and np.asarray(picture.convert("L")).std() > 10
        (shapes / name).unlink()


def test_a_missing_folder_is_named(command):
    status, _, err = command(create_input_files, "--preview", "nowhere")
    assert status == 2
    assert err.endswith("no data folder nowhere: run create_input_files.py --output_folder nowhere first\n")
