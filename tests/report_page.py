"""Actions on the report's page in a browser, shared by tests."""

import numpy as np


def names(page):
    """Return the names of the visible cards in order."""
    script = "return [...document.querySelectorAll('.card:not([hidden]) h2')].map((each) => each.textContent)"
    return page.execute_script(script)


def hover(page, word):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(page).move_to_element(word).perform()


def press(page, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(page).send_keys(*keys).perform()


def words_of(page, card=0):
    return page.find_elements("css selector", ".card")[card].find_elements("css selector", ".word")


def shade(page, points, card=0):
    """Return the opacity of the black overlay, 0 to 255, at points (x, y) in fractions of the photo's sides."""
    script = """
        const canvas = document.querySelectorAll(".card")[arguments[0]].querySelector("canvas");
        const context = canvas.getContext("2d");
        return arguments[1].map(([x, y]) =>
          context.getImageData(Math.floor(x * canvas.width), Math.floor(y * canvas.height), 1, 1).data[3]);"""
    return np.array(page.execute_script(script, card, points))


def overlapping(page):
    """Return the parts of the page that overlap each other or reach out of their parents."""
    return page.execute_script("""
        const boxes = (parent) => [...parent.children]
          .filter((each) => each.offsetParent).map((each) => [each, each.getBoundingClientRect()]);
        const found = [];
        for (const parent of document.querySelectorAll("body, header, #upload, #controls, main, .card, .caption")) {
          const inside = boxes(parent);
          const outer = parent.getBoundingClientRect();
          inside.forEach(([one, a], i) => {
            const isOutside = a.left < outer.left - 1 || a.right > outer.right + 1;
            if (isOutside) found.push(["outside", one.outerHTML.slice(0, 80)]);
            for (const [other, b] of inside.slice(i + 1)) {
              const beside = a.left > b.right - 1 || b.left > a.right - 1;
              if (!beside && a.top < b.bottom - 1 && b.top < a.bottom - 1)
                found.push([one.outerHTML.slice(0, 80), other.outerHTML.slice(0, 80)]);
            }
          });
        }
        return found;""")
