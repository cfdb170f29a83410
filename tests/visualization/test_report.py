"""The report: its content, and what it shows in a browser if there is one."""

import base64
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import report_data
from decoding.captions import Candidate, ImageCaption
from modules.graph import edge_attribution
from modules.regions import grid_boxes
from report_page import hover, names, overlapping, press, shade, words_of
from utils import InputError
from visualization.report import Report, describe_caption, describe_photo, describe_text

WORDS = ["a", "red", "dog", "runs", "over", "grass"]
STRANGE = "</script><script>document.title = 'broken'</script> \"quoted\" & 'so' שלום 🐕"
OBJECTS = [{"words": ["dog"], "box": [0.5, 0.25, 0.75, 0.75]}, {"words": ["red", "ball"], "box": [0.0, 0.5, 0.25, 1.0]}]
METRICS = {"cider": "CIDEr", "bleu_4": "BLEU-4"}


def captioner(*, objects=False, attention=True, edges="grid"):
    """Return the parts of a captioner that the report needs."""
    source = SimpleNamespace(uses_objects=objects, uses_region_features=False)
    decoder = SimpleNamespace(has_attention=attention)
    return SimpleNamespace(region_source=source, decoder=decoder, graph=SimpleNamespace(edges=edges))


def image_caption(words, seed, *, side=4, objects=(), heads=None, graph=False):
    """Return a caption with random attention over a grid of this side; objects add the whole photo and themselves."""
    generator = torch.Generator().manual_seed(seed)
    boxes = grid_boxes(side) if side else torch.zeros(0, 4)
    if objects:
        boxes = torch.cat([boxes, torch.tensor([[0.0, 0.0, 1.0, 1.0], *(item["box"] for item in objects)])])
    R, T = len(boxes), len(words) + 1
    alpha = (3 * torch.randn(T, R, generator=generator)).softmax(dim=1)
    neighbors = torch.arange(R).repeat(R, 1) if graph else None
    return ImageCaption(
        n_best=[Candidate(words, -1.5 - seed, -1.0), Candidate(words[:2], -4.0, -3.0)],
        before_consensus=words,
        alpha=alpha,
        boxes=boxes,
        gates=[0.1 * t for t in range(T)],
        neighbors=neighbors,
        edge_weights=[torch.rand(R, R, generator=generator)] if graph else [],
        heads=None if heads is None else (2 * torch.randn(*heads, T, R, generator=generator)).softmax(dim=-1),
    )


def photo(seed=0, size=(68, 68)):  # cells of 17 pixels, of which one is the center
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def decode(text, *shape):
    """Decode attention weights as the page does."""
    return (np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape) / 255) ** 2


def test_weights_are_within_a_few_percent():
    caption = image_caption(WORDS, seed=1, side=7, heads=(2, 3))
    described = describe_caption(captioner(), caption, [], {"cider": 1.23456})
    T, R = len(WORDS), 49
    for name, alpha, shape in (("alpha", caption.alpha[:T], (T, R)), ("heads", caption.heads[:, :, :T], (2, 3, T, R))):
        found = torch.from_numpy(decode(described[name], *shape)).float()
        torch.testing.assert_close(found, alpha, atol=0.004, rtol=0)
        assert ((found - alpha).abs() <= 0.03 * alpha)[alpha > 1 / R].all()
    assert described["cells"] == 49 and described["boxes"] == described["names"] == []
    assert described["layers"] == [2, 3] and described["gates"] == pytest.approx([0.1 * t for t in range(T)])
    assert described["scores"] == {"cider": 1.2346} and described["n_best"][1] == ["a red", -4.0]


def test_objects_and_their_relations_are_described():
    caption = image_caption(WORDS, seed=1, side=0, objects=OBJECTS, graph=True)
    described = describe_caption(captioner(objects=True, edges="spatial"), caption, OBJECTS)
    assert described["cells"] == 0 and described["names"] == ["", "dog", "red ball"]
    assert described["boxes"][1] == OBJECTS[0]["box"] and described["centers"][1] == [0.625, 0.5]
    for t, edges in enumerate(described["edges"]):
        expected = edge_attribution(caption.alpha[t], caption.neighbors, caption.edge_weights)
        named = [edge for edge in expected if 0 not in edge]  # without the whole photo
        assert [tuple(edge[:2]) for edge in edges] == named
        assert all(share == pytest.approx(expected[source, target], abs=1e-4) for source, target, share, _ in edges)
        assert {edge[:2] == [1, 2]: edge[3] for edge in edges} == {True: 8, False: 4}  # left of, right of, at an angle
    both = describe_caption(captioner(objects=True), image_caption(WORDS, 1, objects=OBJECTS), OBJECTS)
    assert both["cells"] == 16 and len(both["boxes"]) == 3


def test_a_decoder_without_attention_has_no_weights():
    described = describe_caption(captioner(attention=False), image_caption(WORDS, 1), [])
    assert "alpha" not in described and described["words"] == WORDS


def small_report(**changes):
    captions = [("b", "a red dog runs over grass", 0.5), ("a", "two cats sleep", 2.0), ("c", "a man in the snow", 0.0)]
    cards = []
    for i, (name, words, score) in enumerate(captions):
        scores = {"cider": score, "bleu_4": score / 4}
        described = describe_caption(captioner(), image_caption(words.split(), i), [], scores)
        references = [["the", "red", "dog", "runs"], ["grass"]]
        cards.append(describe_photo(f"photos/{name}.jpg", photo(i), [described], references))
    table = [["beam", "CIDEr"], ["3", "0.8333"]]
    return Report("Test", ["best.pt"], METRICS, {"split": "val"}, table, cards, **changes)


def test_the_page_holds_its_data_and_loads_nothing(tmp_path):
    report = small_report()
    report.cards[0]["name"] = STRANGE
    report.write(tmp_path / "report.html")
    page, data = (tmp_path / "report.html").read_text(encoding="utf-8"), report_data(tmp_path / "report.html")
    assert data["cards"][0]["name"] == STRANGE and page.count("<script") == 2 and "{{" not in page
    assert data["table"] == [["beam", "CIDEr"], ["3", "0.8333"]]
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(http|//)", page) and "default-src 'none'" in page
    report.write(tmp_path / "report.html")  # ours is replaced
    (tmp_path / "other.html").write_text("<html>")
    with pytest.raises(InputError, match=r"other.html is not a report of this program and is not replaced"):
        report.write(tmp_path / "other.html")
    assert (tmp_path / "other.html").read_text() == "<html>"


# ------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture
def view(open_page, tmp_path):
    """Open a report in the browser."""

    def opened(report, width=1280, scheme="light"):
        report.write(tmp_path / "report.html")
        return open_page((tmp_path / "report.html").as_uri(), width, scheme)

    return opened


def expected_shade(weights):
    """Return the darkness: 0.8 of black without attention, none from four times the uniform weight on."""
    return 255 * 0.8 * (1 - np.minimum(1, weights * len(weights) / 4))


CENTERS = [((i % 4 + 0.5) / 4, (i // 4 + 0.5) / 4) for i in range(16)]


@pytest.mark.slow
def test_pointing_and_keys_show_the_weights_of_a_word(view):
    report = small_report()
    page = view(report)
    alpha = decode(report.cards[0]["captions"][0]["alpha"], 6, 16)
    hover(page, words_of(page)[2])
    assert np.abs(shade(page, CENTERS) - expected_shade(alpha[2])).max() < 1
    assert "“dog”, gate 0.20" in page.find_element("css selector", ".status").text
    page.execute_script("document.querySelector('.card .word').focus()")
    for t in range(6):
        assert np.abs(shade(page, CENTERS) - expected_shade(alpha[t])).max() < 1
        press(page, "\ue014")  # right
    press(page, "j")
    alpha = decode(report.cards[1]["captions"][0]["alpha"], 3, 16)
    assert np.abs(shade(page, CENTERS, card=1) - expected_shade(alpha[0])).max() < 1
    press(page, "k", "\ue00c")  # back, and escape
    assert page.execute_script("return document.querySelectorAll('[aria-pressed=true].word').length") == 0
    press(page, "j", "p")
    page.implicitly_wait(3)
    assert page.find_elements("css selector", ".card:nth-child(1) .word:nth-child(2)[aria-pressed=true]")
    page.implicitly_wait(0)


@pytest.mark.slow
def test_sorting_the_brush_and_search_choose_cards(view):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import Select

    page = view(small_report())
    assert names(page) == ["b.jpg", "a.jpg", "c.jpg"]
    select = Select(page.find_element("id", "key"))
    for key, order in (("CIDEr", "cba"), ("Length in words", "acb"), ("Log-probability", "cab"), ("BLEU-4", "cba")):
        select.select_by_visible_text(key)
        assert names(page) == [f"{name}.jpg" for name in order], key
    page.find_element("id", "direction").click()
    assert names(page) == ["a.jpg", "b.jpg", "c.jpg"]
    histogram = page.find_element("id", "histogram")
    width = histogram.size["width"]
    drag = ActionChains(page).move_to_element_with_offset(histogram, round(-0.45 * width), 0).click_and_hold()
    drag.move_by_offset(round(0.3 * width), 0).release().perform()  # over the scores that are low, but not the lowest
    assert names(page) == ["b.jpg"] and page.find_element("id", "count").text == "1 of 3 photos"
    page.find_element("id", "reset").click()
    assert len(names(page)) == 3
    page.execute_script("document.getElementById('low').focus()")
    press(page, *["\ue014"] * 5)
    assert names(page) == ["a.jpg", "b.jpg"]
    page.find_element("id", "reset").click()
    for text, found in (("SNOW", "c"), ("two sleep", "a"), ("grass", "abc"), ("zebra", "")):
        page.execute_script("document.activeElement.blur()")
        press(page, "/")
        page.execute_script("document.activeElement.value = ''")
        press(page, text)
        assert names(page) == [f"{name}.jpg" for name in found]


@pytest.mark.slow
def test_references_and_other_models_are_compared_word_by_word(view):
    report = small_report()
    report.models = ["mine", "theirs"]
    others = [("a dog runs over green grass", 0.9), ("two cats sleep", 1.0), ("a woman", 0.4)]
    for card, (text, score) in zip(report.cards, others, strict=True):
        card["captions"].append(describe_text(text.split(), {"cider": score, "bleu_4": 0.1}))
    page = view(report)
    assert names(page) == ["b.jpg", "c.jpg", "a.jpg"]  # by the difference of CIDEr
    script = "return [...document.querySelectorAll('.card:first-child mark')].map((m) => [m.textContent, m.dataset.n])"
    marks = page.execute_script(script)
    assert marks == [["red", "3"], ["dog", "3"], ["runs", "3"], ["grass", "1"]]
    differing = page.execute_script(
        "return [...document.querySelector('.card').querySelectorAll('.differs')].map((each) => each.textContent)"
    )
    assert differing == ["red0.10", "green"]
    hover(page, words_of(page)[-1])
    assert "the attention of this caption is unknown" in page.find_element("css selector", ".status").text


@pytest.mark.slow
def test_layers_heads_objects_and_arrows_are_shown(view):
    from selenium.webdriver.support.ui import Select

    caption = image_caption(WORDS, 3, side=0, objects=OBJECTS, heads=(2, 3), graph=True)
    described = describe_caption(captioner(objects=True, edges="spatial"), caption, OBJECTS)
    other = image_caption(WORDS, 4, side=0, objects=OBJECTS, heads=(1, 1))
    other = describe_caption(captioner(objects=True), other, OBJECTS)
    card = describe_photo("x.jpg", photo(size=(60, 40)), [described, other])
    page = view(Report("Objects", ["best.pt", "other.pt"], cards=[card], attention="layer 1, head 3"))
    first = words_of(page)[0]
    layer, head = (Select(page.find_element("id", name)) for name in ("layer", "head"))
    assert layer.first_selected_option.text == "layer 1, head 3"

    def check(weights):
        # The whole photo lights all of it, an object its box: each is as bright as the larger weight.
        expected = expected_shade(weights)[[0, 1, 2]]
        assert np.abs(shade(page, [[0.9, 0.1], [0.6, 0.5], [0.1, 0.9]]) - np.minimum(expected, expected[0])).max() < 1

    hover(page, first)
    check(decode(described["alpha"], 6, 3)[0])
    heads = decode(described["heads"], 2, 3, 6, 3)
    head.select_by_value("2")
    assert layer.first_selected_option.text == "2"
    check(heads[1, 1, 0])
    layer.select_by_value("1")
    check(heads[0, 1, 0])
    head.select_by_value("0")
    check(heads[0, :, 0].mean(axis=0))
    layer.select_by_value("2")
    hover(page, words_of(page)[6])
    assert "no such layer or head" in page.find_element("css selector", ".status").text
    assert not page.find_elements("css selector", ".photo line")
    page.find_element("id", "edges").click()
    hover(page, first)
    arrows = page.find_elements("css selector", ".photo line")
    named = {text.get_attribute("textContent") for text in page.find_elements("css selector", ".photo text")}
    assert len(arrows) == 3 * len(described["edges"][0]) and named >= {"left of", "right of"}


@pytest.mark.slow
def test_regions_without_boxes_have_numbers(view):
    caption = replace(image_caption(WORDS, 3, side=2), boxes=torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(4, 1))
    features = captioner()
    features.region_source.uses_region_features = True
    card = describe_photo("x.jpg", photo(), [describe_caption(features, caption, [])])
    page = view(Report("Features", ["best.pt"], cards=[card]))
    hover(page, words_of(page)[0])
    largest = int(caption.alpha[0].argmax()) + 1
    assert f"largest weight at region {largest}: " in page.find_element("css selector", ".status").text
    assert (shade(page, CENTERS) == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280, 2560])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overlaps(view, width, scheme):
    report = small_report()
    report.cards[0] |= {"name": STRANGE * 3, "references": [STRANGE, "x" * 300]}
    words = [*STRANGE.split(), "y" * 80]
    report.cards[0]["captions"] = [describe_caption(captioner(), image_caption(words, 0), [], {"cider": 1.0})]
    page = view(report, width, scheme)
    assert page.title == "Test"
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    for details in page.find_elements("css selector", "details"):
        page.execute_script("arguments[0].open = true", details)
    assert overlapping(page) == []
    background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 300) == (scheme == "dark")


@pytest.mark.slow
def test_a_thousand_photos_open_at_once(view):
    report = small_report()
    caption = describe_caption(captioner(), image_caption(WORDS, 1, side=7), [], {"cider": 0.5, "bleu_4": 0.1})
    cards = [describe_photo(f"{i}.jpg", photo(i, (224, 224)), [caption], [WORDS] * 5) for i in range(20)]
    report.cards = [dict(cards[i % 20], name=f"{i}.jpg") for i in range(1000)]
    page = view(report)
    assert len(names(page)) < 60  # others are made when they come near
    page.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    page.implicitly_wait(3)
    assert page.find_elements("css selector", ".card:nth-child(1000) .word")
    page.implicitly_wait(0)
