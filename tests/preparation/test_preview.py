"""The preview of a prepared folder."""

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

import create_input_files
from preparation import preview


def test_preview_plots_photos_and_words(command, shapes):
    status, out, err = command(create_input_files, "--preview", shapes)
    assert status == 0, err
    for name in ("contact_sheet.png", "words.png"):
        with Image.open(shapes / name) as picture:
            assert str(shapes / name) in out and picture.width > 500 and np.asarray(picture.convert("L")).std() > 10
        (shapes / name).unlink()


def test_boxes_lie_where_the_objects_are(shapes, monkeypatch):
    figures = []
    monkeypatch.setattr(preview, "save_figure", lambda figure, path: figures.append(figure))
    preview.plot_preview(shapes)
    figure: Figure = figures[0]
    figure.set_dpi(100)
    tile = figure.axes[0]
    patch, text = tile.patches[0], tile.texts[0]
    entry = preview.read_captions(shapes, "train").objects[0][0]
    left, top, right, bottom = (32 * edge - 0.5 for edge in entry["box"])
    assert np.allclose(patch.get_bbox().extents, (left, top, right, bottom)) and text.get_text() == " ".join(
        entry["words"]
    )
    color = np.array(to_rgb(entry["words"][1]))
    x, y = round((left + right) / 2), round((top + bottom) / 2)
    assert np.abs(tile.images[0].get_array()[y, x] / 255 - color).max() < 0.4  # the shape lies in its box
