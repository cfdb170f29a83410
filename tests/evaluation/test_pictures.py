"""The pictures show the attention and the edges at the right positions."""

import numpy as np
from PIL import Image

from evaluation.pictures import plot_attention, plot_edges


def test_tiles_are_bright_where_the_attention_is_high():
    photo = Image.new("RGB", (80, 40), (200, 200, 200))
    figure = plot_attention(photo, ["one", "two"], np.eye(4)[[1, 2]])
    tiles = [axes for axes in figure.axes if axes.get_title()]
    assert [tile.get_title() for tile in tiles] == ["one", "two"]
    first, second = (np.asarray(tile.images[0].get_array())[..., 0] for tile in tiles)
    assert first.shape == (40, 80)
    assert first[:20, 40:].mean() > 2 * first[20:, :40].mean()  # region 1 is at the top right
    assert second[20:, :40].mean() > 2 * second[:20, 40:].mean()  # region 2 at the bottom left


def test_arrows_point_from_source_to_target():
    edges = {(0, 3): 0.5, (1, 3): 0.25}
    figure = plot_edges(Image.new("RGB", (80, 40)), "dog", np.array([0.1, 0.1, 0.1, 0.7]), edges)
    arrows = figure.axes[0].texts
    assert [(arrow.xyann, arrow.xy) for arrow in arrows] == [((20, 10), (60, 30)), ((60, 10), (60, 30))]
    assert arrows[0].arrow_patch.get_linewidth() == 2 * arrows[1].arrow_patch.get_linewidth()
