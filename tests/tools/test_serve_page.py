"""The served page in a browser: chosen, dropped and pasted photos become cards."""

import time

import numpy as np
import pytest

from report_page import hover, names, overlapping, words_of
from served_photos import STRANGE


def wait_for(page, progress):
    deadline = time.monotonic() + 20
    while page.find_element("id", "progress").text != progress and time.monotonic() < deadline:
        time.sleep(0.05)


def drop_and_paste(page, content):
    """Drop a photo on the page and, before it is captioned, paste it."""
    script = """
        const transfer = (name) => {
          const data = new DataTransfer();
          data.items.add(new File([Uint8Array.from(arguments[0])], name));
          return data;
        };
        const drop = { bubbles: true, cancelable: true, dataTransfer: transfer("dropped.jpg") };
        document.body.dispatchEvent(new DragEvent("drop", drop));
        const paste = { bubbles: true, clipboardData: transfer("pasted.jpg") };
        document.body.dispatchEvent(new ClipboardEvent("paste", paste));"""
    page.execute_script(script, list(content))


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_chosen_photos_become_cards_newest_first(open_page, server, sent_photos, tmp_path, width):
    chosen = []
    for name in ("1.jpg", STRANGE):
        (tmp_path / name).write_bytes(sent_photos["1.jpg"])
        chosen.append(str(tmp_path / name))
    (tmp_path / "b.txt").write_text("no photo")
    page = open_page(f"http://127.0.0.1:{server.server_port}/", width)
    assert not page.find_element("id", "controls").is_displayed()
    page.find_element("id", "photos").send_keys("\n".join([*chosen, str(tmp_path / "b.txt")]))
    wait_for(page, "2 of 3 captioned")
    assert page.find_element("id", "errors").text.startswith("b.txt: not a photo (JPEG")
    assert [entry["message"] for entry in page.get_log("browser") if "400" not in entry["message"]] == []
    assert names(page) == [STRANGE, "1.jpg"] and page.find_element("id", "count").text == "2 of 2 photos"
    hover(page, words_of(page)[0])
    assert "largest weight at row" in page.find_element("css selector", ".status").text
    blackness = page.execute_script(
        "const c = document.querySelector('.card canvas');"
        "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 3)"
    )
    assert np.mean(blackness) > 10
    page.execute_script("document.querySelector('.card .word').focus()")
    drop_and_paste(page, sent_photos["1.jpg"])
    wait_for(page, "2 of 2 captioned")
    assert names(page) == ["pasted.jpg", "dropped.jpg", STRANGE, "1.jpg"]
    assert page.execute_script("return document.activeElement.closest('.card').ariaLabel") == STRANGE
    page.find_element("id", "direction").click()
    assert names(page) == ["1.jpg", STRANGE, "dropped.jpg", "pasted.jpg"]
    page.find_element("id", "search").send_keys("zebra")
    assert names(page) == [] and overlapping(page) == []
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
