"""Pictures show attention and edges at the right positions, and never replace a file of the user."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from modules.regions import grid_boxes, spatial_relations
from utils import InputError
from visualization.photos import Regions, is_our_picture, open_for_picture, picture_paths
from visualization.pictures import plot_attention, plot_edges, save_picture

WHITE = Image.new("RGB", (80, 40), "white")


def cells(side):
    return Regions(grid_boxes(side).numpy(), [None] * side**2)


def tiles_of(figure):
    """Return the pixels of a figure's tiles, without the photo."""
    return [np.asarray(image.get_array())[..., 0] / 255 for image in figure.axes[0].images[1:]]


def titles_of(figure):
    """Return the titles of a figure's tiles, words and numbers, without the photo's."""
    texts = [text.get_text() for text in figure.axes[0].texts[2:]]
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_tiles_are_bright_where_the_attention_is_high():
    figure = plot_attention(WHITE, ["one", "two"], np.eye(4)[[1, 2]], [0.25, 1.0])
    assert titles_of(figure) == [("one", "max 1.000, gate 0.25"), ("two", "max 1.000, gate 1.00")]
    first, second = tiles_of(figure)
    height, width = first.shape[0] // 2, first.shape[1] // 2
    assert width == pytest.approx(2 * height, abs=1)
    assert first[:height, width:].mean() > 2 * first[height:, :width].mean()  # region 1 is at the top right
    assert second[height:, :width].mean() > 2 * second[:height, width:].mean()  # region 2 at the bottom left


def test_nearly_uniform_attention_looks_nearly_uniform_and_sharp_attention_sharp():
    uniform = np.full(49, 1 / 49) + np.linspace(-1e-4, 1e-4, 49)
    figure = plot_attention(WHITE, ["vague", "sharp"], np.stack([uniform, np.eye(49)[24]]))
    vague, sharp = tiles_of(figure)
    assert np.ptp(vague) < 0.02 and 0.3 < vague.mean() < 0.5
    assert sharp.max() == 1 and sharp.min() < 0.25 < vague.min()  # one scale for both
    assert titles_of(figure) == [("vague", "max 0.021"), ("sharp", "max 1.000")]


def test_all_pictures_share_one_scale():
    alpha = np.random.default_rng(0).dirichlet(np.ones(16), 2)
    both, first = (tiles_of(plot_attention(WHITE, ["a", "b"][:n], alpha[:n])) for n in (2, 1))
    np.testing.assert_array_equal(both[0], first[0])


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000), (500, 375)])
def test_both_sides_of_a_picture_are_bounded(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "photo.png")
    photo = open_for_picture(tmp_path / "photo.png", "squash")
    assert max(photo.size) == 400 and min(photo.size) >= 160
    for words in (0, 60):
        width, height = plot_attention(photo, ["word"] * words, np.full((words, 49), 1 / 49)).get_size_inches()
        assert width <= 11.51 and height <= 16
    width, height = plot_edges(photo, "word", np.full(49, 1 / 49), {}, cells(7)).get_size_inches()
    assert max(width, height) <= 16


def test_thirty_words_stay_readable(tmp_path):
    """No two titles overlap, and none is smaller than seven points."""
    words = ["a", "basketball", "photographer"] * 10
    for size in ((400, 400), (160, 400)):
        figure = plot_attention(Image.new("RGB", size), words, np.full((30, 49), 1 / 49), [0.5] * 30)
        figure.savefig(tmp_path / "picture.png", dpi=100)
        texts = [text for text in figure.axes[0].texts if text.get_text()]
        boxes = [text.get_window_extent() for text in texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert all(text.get_fontsize() >= 6 for text in texts)


def test_words_that_are_not_valid_mathtext_are_drawn(tmp_path):
    words = ["$5_$", "$\\frac$", "a_b^c"]
    save_picture(plot_attention(WHITE, words, np.full((3, 4), 0.25)), tmp_path / "a.png")
    for word in words:
        save_picture(plot_edges(WHITE, word, np.full(4, 0.25), {}, cells(2)), tmp_path / "b.png")


def test_missing_glyphs_are_returned_and_other_warnings_are_not_swallowed(tmp_path, monkeypatch):
    figure = plot_attention(WHITE, ["猫", "cat", "猫が"], np.full((3, 4), 0.25))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert save_picture(figure, tmp_path / "a.png") == {"猫", "が"}
    monkeypatch.setattr(figure, "savefig", lambda *_, **__: warnings.warn("something else", stacklevel=1))
    with pytest.warns(UserWarning, match="something else"):
        assert save_picture(figure, tmp_path / "b.png") == set()


def test_only_pictures_of_ours_are_replaced(tmp_path):
    figure = plot_attention(WHITE, [], np.full((1, 4), 0.25))
    save_picture(figure, tmp_path / "cat_attention.png")
    assert is_our_picture(tmp_path / "cat_attention.png")
    (paths,) = picture_paths(["x/cat.jpg"], tmp_path, ["attention"])
    assert paths == {"attention": tmp_path / "cat_attention.png"}
    figure.savefig(tmp_path / "cat_edges.png")
    (tmp_path / "dog_attention.png").write_text("not a picture")
    (tmp_path / "cow_attention.png").mkdir()
    (tmp_path / "pig_attention.png").symlink_to("nowhere.png")
    for photo, kind in (("cat", "edges"), ("dog", "attention"), ("cow", "attention"), ("pig", "attention")):
        with pytest.raises(InputError, match=f"{photo}_{kind}.png is not a picture of caption.py"):
            picture_paths([f"{photo}.jpg"], tmp_path, ["attention", "edges"])


def test_photos_of_the_same_name_get_pictures_of_their_own(tmp_path):
    photos = ["a/cat.jpg", "cat-2.png", "b/cat.jpg", "cat.gif"]
    names = [paths["attention"].name for paths in picture_paths(photos, tmp_path, ["attention"])]
    assert names == ["cat_attention.png", "cat-2_attention.png", "cat-3_attention.png", "cat-4_attention.png"]


def test_arrows_point_from_source_to_target():
    edges = {(0, 3): 0.5, (1, 3): 0.25}
    figure = plot_edges(Image.new("RGB", (80, 40)), "dog", np.array([0.1, 0.1, 0.1, 0.7]), edges, cells(2))
    arrows = figure.axes[0].texts
    assert [(arrow.xyann, arrow.xy) for arrow in arrows] == [((20, 10), (60, 30)), ((60, 10), (60, 30))]
    assert arrows[0].arrow_patch.get_linewidth() == 2 * arrows[1].arrow_patch.get_linewidth()


def test_edges_between_objects_have_the_names_of_their_relations():
    boxes = np.array([[0, 0, 1, 1], [0.1, 0.1, 0.3, 0.3], [0.6, 0.1, 0.8, 0.3]])
    relations = spatial_relations(torch.tensor(boxes).unsqueeze(0))[0].numpy()
    regions, edges = Regions(boxes, ["", "dog", "ball"]), {(0, 2): 0.5, (1, 2): 0.25, (2, 1): 0.1}
    figure = plot_edges(WHITE, "ball", np.array([0.2, 0.2, 0.6]), edges, regions, relations)
    texts = [text.get_text().strip() for text in figure.axes[0].texts]
    assert sorted(filter(None, texts)) == ["ball", "dog", "left of", "right of"]  # nothing of the whole photo
    positions = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert positions["left of"][0] < positions["right of"][0] and len(figure.axes[0].patches) == 2


def test_objects_are_bright_framed_and_named():
    boxes = np.array([[0, 0, 1, 1], [0.5, 0, 1, 0.5], [0, 0.5, 0.25, 1]])  # the whole photo, two objects
    regions = Regions(boxes, ["", "dog", "ball"])
    alpha = np.array([[0, 1, 0], [0, 0.5, 0.5], [1, 0, 0]])
    figure = plot_attention(WHITE, ["one", "two", "all"], alpha, None, regions)
    one, two, whole = tiles_of(figure)
    assert one[0, -1] == pytest.approx(0.8, abs=0.01) and one[0, 0] == one[-1, -1] == one[-1, 0] == pytest.approx(0.2)
    assert two[0, -1] == two[-1, 0] == pytest.approx(0.5, abs=0.01) and two[-1, -1] == pytest.approx(0.2)
    assert (whole == whole[0, 0]).all()
    assert whole[0, 0] == pytest.approx(0.8, abs=0.01)  # three times the uniform weight
    names = [name for text in figure.axes[0].texts if (name := text.get_text().strip()) in ("dog", "ball")]
    assert sorted(names) == ["ball", "dog", "dog"] and len(figure.axes[0].patches) == 3


def test_an_object_is_drawn_over_the_cells():
    boxes = np.concatenate([grid_boxes(2).numpy(), [[0, 0, 1, 1], [0, 0, 0.5, 0.5]]])
    alpha = np.array([[0, 0, 0, 0.5, 0, 0.5]])
    (tile,) = tiles_of(plot_attention(WHITE, ["dog"], alpha, None, Regions(boxes, [None, None, None, None, "", "dog"])))
    assert tile[0, 0] > 0.75 and tile[-1, -1] > 0.6 and tile[0, -1] < 0.3
