"""The site in a real browser, from the disk, as a reader has it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sites
from browser import Browser, address, browser, needs_browser

pytestmark = needs_browser
ROUTES = ["#/", "#/2", "#/2/0", "#/2/1", "#/2/9", "#/2/5?sort=-density&page=2", "#/nowhere", "#/2/5000", "#/%"]


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as one:
        yield one


@pytest.fixture(autouse=True)
def usual(window: Browser) -> None:
    window.size(1280)
    window.prefer("light")
    window.driver.get("about:blank")
    window.complaints()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two SAEs of 128 features; every tenth feature is dead, and 2/0 is hostile."""
    folder = tmp_path_factory.mktemp("site")
    return sites.write(folder, sites.about("2"), sites.about("3"), first=sites.hostile())


def rows(window: Browser) -> list[int]:
    """The features that the list shows, from above."""
    return [int(text) for text in window.texts(".features tbody th")]


def fires(index: int) -> int:
    if index % 10 == 9:
        return 0
    return (sites.hostile() if index == 0 else sites.alive(index)).fires


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("route", ROUTES)
def test_no_page_has_an_error(window: Browser, site: Path, route: str, theme: str) -> None:
    window.prefer(theme)
    window.open(address(site, route))
    assert window.text("h1")
    assert window.complaints() == []


def test_the_list_of_saes_leads_to_a_feature(window: Browser, site: Path) -> None:
    window.open(address(site))
    window.click("tbody a")
    assert window.text(".overview h1") == "tiny-res 2"
    window.click(".features tbody tr:nth-child(4) a")
    assert window.text(".feature h1") == "Feature 3"
    window.click("#trail li:nth-child(2) a")
    assert window.text(".overview h1") == "tiny-res 2"


def test_what_the_overview_rests_on(window: Browser, site: Path) -> None:
    window.open(address(site, "#/2"))
    text = window.text(".pair")
    for known in ("blocks.2.hook_resid_pre", "builtin:heldout", "64,990 scored", "seed0", "torch 2.13.0"):
        assert known in text
    assert "ce_delta0.4301 [0.2900, 0.5700]0.4064" in text
    assert "l1––" in text, "what is not known is no number"


def test_search_by_token(window: Browser, site: Path) -> None:
    window.open(address(site, "#/2"))
    window.click("#search")
    window.press(" RIVER")
    wanted = [
        i for i in range(1, 128) if fires(i) and any(sites.WORDS[t.token] == " river" for t in top(sites.alive(i)))
    ]
    assert rows(window) == wanted[:50]
    assert window.text(".status").startswith(f"{len(wanted)} features of 128")


def top(feature: Any) -> Any:
    return feature.tokens_by_share[:5]


def test_search_by_logit(window: Browser, site: Path) -> None:
    window.open(address(site, "#/2?by=logit&q=house"))
    wanted = [i for i in range(1, 128) if any(sites.WORDS[w.token] == " house" for w in promoted(i))]
    assert rows(window) == wanted[:50]


def promoted(index: int) -> Any:
    logits = sites.alive(index).logits
    assert logits is not None
    return logits.promoted


def test_search_by_index(window: Browser, site: Path) -> None:
    window.open(address(site, "#/2"))
    window.run("const s = document.querySelector('select'); s.value = 'index'; s.dispatchEvent(new Event('change'))")
    window.click("#search")
    window.press("12")
    assert rows(window) == [12, *range(120, 128)]


def test_what_is_not_found(window: Browser, site: Path) -> None:
    window.open(address(site, "#/2?q=zebra"))
    assert rows(window) == []
    assert window.text(".status") == "0 features of 128"


@pytest.mark.parametrize("column", range(9))
def test_every_column_sorts_both_ways(window: Browser, site: Path, column: int) -> None:
    """What is unknown comes last both ways; the list keeps the focus where it was."""
    window.open(address(site, "#/2"))
    orders = []
    head = f".features thead th:nth-child({column + 1})"
    new = "const way = document.querySelector(arguments[0]).ariaSort; return arguments[1].includes(way) ? null : way"
    for _ in range(2):
        before = [window.run("return document.querySelector(arguments[0]).ariaSort", head)]
        window.click(f"{head} button")
        orders.append(window.until(new, head, [*before, None]))
        assert window.run("return document.activeElement.closest('th').hasAttribute('aria-sort')")
        if column not in (0, 2, 5, 6, 8):  # of which the dead have nothing
            assert not any(index % 10 == 9 for index in rows(window))
    assert set(orders) == {"ascending", "descending"}


def test_density_sorts_by_firings(window: Browser, site: Path) -> None:
    window.open(address(site, "#/2?sort=-density"))
    expected = sorted(range(128), key=lambda i: (-fires(i), i))
    assert rows(window) == expected[:50]


def test_divergence_sorts_by_the_lower_end(window: Browser, site: Path) -> None:
    window.open(address(site, "#/2?sort=-divergence"))
    known = [sites.hostile(), *(sites.alive(i) for i in range(1, 128) if fires(i))]
    expected = sorted(known, key=lambda f: (-round(f.divergence.lo or 0, 9), f.index))
    assert rows(window) == [feature.index for feature in expected[:50]]


def test_a_bar_lists_its_features(window: Browser, site: Path) -> None:
    window.open(address(site, "#/2"))
    window.until("return document.querySelector('.pick.dead')")
    window.click(".pick.dead")
    window.until("return document.querySelector('.filter a')")
    assert rows(window) == list(range(9, 128, 10))
    window.click(".filter a")
    window.until("return !document.querySelector('.filter a')")
    assert len(rows(window)) == 50


def test_a_bar_obeys_the_keyboard(window: Browser, site: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    window.open(address(site, "#/2"))
    window.until("return document.querySelectorAll('.pick[role]')[3]")
    label = window.run("const b = document.querySelectorAll('.pick[role]')[3]; b.focus(); return b.ariaLabel")
    window.press(Keys.ENTER)
    count = int(str(re.findall(r": (\d+) feature", label)[0]))
    window.until("return document.querySelector('.filter a')")
    assert len(rows(window)) == count > 0
    assert window.run("return document.activeElement.getAttribute('aria-pressed')") == "true"


def test_the_bars_hold_all_features(window: Browser, site: Path) -> None:
    window.open(address(site, "#/2"))
    window.until("return document.querySelector('.pick[role]')")
    labels = window.run("return [...document.querySelectorAll('.pick[role]')].map(bar => bar.ariaLabel)")
    assert sum(int(re.findall(r": (\d+) feature", label)[0]) for label in labels) == 128


def test_a_link_to_a_filtered_list(window: Browser, site: Path) -> None:
    window.open(address(site, "#/2?sort=-index&by=index&q=1&bin=dead"))
    assert rows(window) == [119, 109, 19]


def test_pages_of_the_list(window: Browser, site: Path) -> None:
    window.open(address(site, "#/2"))
    window.click(".pager [aria-label='last page']")
    window.until("return location.hash.includes('page=3')")
    assert rows(window) == list(range(100, 128))


def test_back_restores_the_list(window: Browser, site: Path) -> None:
    """Sorting, filter, search, page and the place on the page."""
    window.open(address(site, "#/2?sort=-max&q=a"))
    window.run("scrollTo(0, 600)")
    window.until("return history.state?.y === 600")
    before, wanted = rows(window), window.run("return location.hash")
    window.run("document.querySelector('.features tbody tr:nth-child(3) a').click()")
    assert window.text(".feature h1") == f"Feature {before[2]}"
    window.driver.back()
    window.until("return document.querySelector('.overview')")
    assert (rows(window), window.run("return location.hash")) == (before, wanted)
    assert window.run("return [document.querySelector('#search').value, scrollY]") == ["a", 600]


def test_a_deep_link_and_a_reload(window: Browser, site: Path) -> None:
    window.open(address(site, "#/3/42?sort=-density"))
    assert window.text("h1") == "Feature 42"
    window.driver.refresh()
    window.until("return document.documentElement.dataset.drawn")
    assert window.text("h1") == "Feature 42"
    assert window.driver.title == "tiny-res 3 · feature 42"


def test_j_and_k_follow_the_list(window: Browser, site: Path) -> None:
    order = sorted(range(128), key=lambda i: (-fires(i), i))
    window.open(address(site, f"#/2/{order[5]}?sort=-density"))
    for key, index in (("j", 6), ("j", 7), ("k", 6)):
        window.press(key)
        window.until("return document.querySelector('h1').textContent === arguments[0]", f"Feature {order[index]}")
    window.press("g", "h")
    window.until("return document.querySelector('.overview')")
    assert window.run("return location.hash") == "#/2?sort=-density"


def test_keys_of_the_list(window: Browser, site: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    window.open(address(site, "#/2"))
    window.press("/")
    assert window.run("return document.activeElement.id") == "search"
    window.press("j", "?")
    assert window.run("return document.querySelector('#search').value") == "j?", "letters are typed, not obeyed"
    window.press(Keys.ESCAPE)
    assert window.run("return document.activeElement.tagName") == "BODY"
    window.press("?")
    assert window.run("return document.querySelector('dialog').open")
    window.press(Keys.ESCAPE)
    assert not window.run("return document.querySelector('dialog').open")


def test_slash_on_a_feature_leads_to_the_search(window: Browser, site: Path) -> None:
    window.open(address(site, "#/2/3"))
    window.press("/")
    window.until("return document.activeElement.id === 'search'")


def test_a_feature_that_never_fired(window: Browser, site: Path) -> None:
    window.open(address(site, "#/2/9"))
    note = window.text(".dead-note")
    assert note == "Dead: did not fire on 64,990 tokens: density below 4.6e-5 with 95 % confidence."
    assert window.texts(".line") == [] and "None: it did not fire." in window.text(".contexts")


def test_a_feature_without_anything(window: Browser, tmp_path: Path) -> None:
    """Dead, and its decoder direction is 0."""
    from saezoo.features.records import Feature

    sites.write(tmp_path, sites.about(features=(0,)), first=Feature(0, 0, 0.0, None, None, None))
    window.open(address(tmp_path, "#/2/0"))
    assert "None: its decoder direction is 0." in window.text(".weights")
    assert window.complaints() == []


def test_numbers_of_a_feature(window: Browser, site: Path) -> None:
    one = sites.alive(1)
    window.open(address(site, "#/2/1"))
    known = window.text(".head .facts")
    assert f"density1 in {round(64_990 / one.fires):,} ({one.density:.1e})".replace("e-0", "e-") in known
    assert f"fires on{one.fires:,} tokens" in known
    assert f"max{one.max:.3g}" in known
    assert window.run("return document.querySelector('.title > a').href").endswith("gpt2-small/8-res-jb/1")
    assert window.texts(".group h3")[1].startswith("Largest fifth ")
    assert len(window.texts(".line")) == 20 + 25


def test_a_firing_stands_at_the_same_place_in_every_line(window: Browser, site: Path) -> None:
    window.open(address(site, "#/2/1"))
    places = window.run(
        "return [...document.querySelectorAll('.own')].map(t => t.getBoundingClientRect())"
        ".map(box => box.left + box.width / 2)"
    )
    assert max(places) - min(places) <= 2


def test_values_on_focus_and_on_hover(window: Browser, site: Path) -> None:
    """Arrows walk among the firings; a line is one stop of the Tab key."""
    from selenium.webdriver.common.keys import Keys

    window.open(address(site, "#/2/1"))
    value = window.run("const own = document.querySelector('.own'); own.focus(); return own.dataset.value")
    assert f" {float(value):.3g} (" in window.text("#tip:not([hidden])")
    window.press(Keys.ARROW_DOWN)
    assert window.run("return document.activeElement === document.querySelectorAll('.own')[1]")
    assert window.run("return document.activeElement.getAttribute('aria-describedby')") == "tip"
    assert window.run(
        "return [...document.querySelectorAll('.text')].every(l => l.querySelectorAll('[tabindex=\"0\"]').length === 1)"
    )
    window.press(Keys.ESCAPE)
    assert window.run("return document.querySelector('#tip').hidden")
    window.click(".own")
    assert not window.run("return document.querySelector('#tip').hidden")


def test_neighbours_are_links_where_there_is_a_page(window: Browser, site: Path) -> None:
    window.open(address(site, "#/2/1"))
    links = window.run("return [...document.querySelectorAll('.weights a')].map(a => a.hash)")
    assert [f"#/2/{1 + i}" for i in range(1, 6)] == links[:5]


def test_hostile_tokens_do_nothing(window: Browser, site: Path) -> None:
    for route in ("#/2", "#/2/0"):
        window.open(address(site, route))
        assert window.run("return window.hurt ?? null") is None
        assert window.run("return document.querySelectorAll('main img, main script').length") == 0
    assert "</script><script>window.hurt=1</script>" in window.text(".text")


def test_hostile_tokens_are_shown_as_what_they_are(window: Browser, site: Path) -> None:
    window.open(address(site, "#/2/0"))
    shown = dict(zip(["end", *sites.HOSTILE, "unknown"], window.texts(".text > .token"), strict=False))
    assert shown["override"] == " aU+202Eb"
    assert shown["nul"] == "U+0000U+001B[31m"
    assert shown["zero width"] == "xU+200ByU+FEFF"
    assert shown["quotes"] == "'\"\\`${window.hurt=3}U+2028U+2029"
    assert shown["marks"] == "U+00B7U+21B5U+21E5"
    assert (shown["first half"], shown["second half"], shown["lone byte"]) == (" E2 80", "99", "FF")
    assert (shown["accent"], shown["unknown"]) == ("◌\u0301e", "id 5000")


def test_half_a_letter_says_which(window: Browser, site: Path) -> None:
    window.open(address(site, "#/2/0"))
    titles = window.run("return [...document.querySelectorAll('.text bdi[title]')].map(node => node.title)")
    assert "bytes 20 E2 80: with its neighbours  ’" in titles
    assert "bytes 99: with its neighbours ’" in titles
    assert "bytes FF: part of a letter" in titles


def test_hebrew_does_not_reorder_the_line(window: Browser, site: Path) -> None:
    window.open(address(site, "#/2/0"))
    lefts = window.run(
        "return [...document.querySelectorAll('.text')][0].querySelectorAll('.token').values()"
        ".map(node => node.getBoundingClientRect().left).toArray()"
    )
    assert lefts == sorted(lefts)


def test_an_incomplete_site_says_so(window: Browser, tmp_path: Path) -> None:
    sites.write(tmp_path, complete=False)
    window.open(address(tmp_path))
    assert "This site is incomplete" in window.text("#banner:not([hidden])")
    assert "Run the same command again" in window.text("#banner")


def test_an_sae_that_is_not_written_yet(window: Browser, tmp_path: Path) -> None:
    """Those that are can be read meanwhile."""
    from saezoo.features.site import Site

    known = [sites.about("2"), sites.about("3")]
    Site(tmp_path, known, vocabulary=sites.VOCABULARY, special={0}).write(known[0], sites.features(known[0]))
    window.open(address(tmp_path, "#/3/5"))
    assert window.text("h1") == "3 is not written yet."
    window.open(address(tmp_path, "#/2/5"))
    assert window.text("h1") == "Feature 5"


def test_the_site_over_http(window: Browser, site: Path) -> None:
    """As from the disk, from `serve`'s server."""
    import functools
    import threading
    from http.server import ThreadingHTTPServer

    from saezoo.features.serve import Handler

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, folder=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        window.open(f"http://127.0.0.1:{server.server_address[1]}/#/2/5")
        assert (window.text("h1"), window.complaints()) == ("Feature 5", [])
        window.driver.get("about:blank")
        server.shutdown()


NUMBERS = {
    "format.number(0.0100)": "0.0100",
    "format.number(-1.2345)": "−1.23",
    "format.number(12345.6)": "12,346",
    "format.number(0.000123)": "1.23e-4",
    "format.number(0)": "0",
    "format.number(null)": "–",
    "format.count(24576)": "24,576",
    "format.count(null)": "–",
    "format.density(53, 64990)": "1 in 1,226 (8.2e-4)",
    "format.density(64990, 64990)": "1 in 1.0 (1.0e0)",
    "format.density(0, 64990)": "dead",
    "format.power(format.densityBound(64990))": "4.6e-5",
    "format.interval([0.5, null, null])": "0.500",
    "format.interval(null)": "–",
    "binName(binOf(1000, 10000))": "density 1.0e-1 to 1.8e-1",
    "binName(binOf(64990, 64990))": "density 5.6e-1 to 1.0e0",
}


@pytest.mark.parametrize("call", NUMBERS)
def test_numbers_as_text(window: Browser, site: Path, call: str) -> None:
    """What is unknown is a dash, never 0."""
    window.open(address(site))
    assert window.run(f"return {call}") == NUMBERS[call]


def test_a_complete_site_has_no_banner(window: Browser, site: Path) -> None:
    window.open(address(site))
    assert window.run("return document.querySelector('#banner').hidden")


@pytest.mark.parametrize("name", ["sae0/0", "sae0/list", "tokens"])
def test_a_lost_file_is_named(window: Browser, tmp_path: Path, name: str) -> None:
    sites.write(tmp_path)
    (tmp_path / "data" / f"{name}.js").unlink()
    window.open(address(tmp_path, "#/2/3"))
    assert window.text("h1") == f"data/{name}.js is missing"


@pytest.mark.parametrize("end", ["", '")\n'])
def test_a_file_that_was_cut_off_is_named(window: Browser, tmp_path: Path, end: str) -> None:
    path = sites.write(tmp_path) / "data" / "sae0" / "0.js"
    path.write_text(path.read_text()[:1024] + end)
    window.open(address(tmp_path, "#/2/3"))
    assert window.text("h1") == "data/sae0/0.js is damaged"


def test_the_theme_is_chosen_and_remembered(window: Browser, site: Path) -> None:
    paper = "return getComputedStyle(document.body).backgroundColor"
    window.open(address(site))
    light = window.run(paper)
    window.click("#theme-button")
    dark = window.run(paper)
    assert light != dark
    window.open(address(site, "#/2"))
    assert window.run(paper) == dark
    window.click("#theme-button")
    window.run("localStorage.clear()")
    assert window.run(paper) == light


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("route", ROUTES)
def test_no_page_scrolls_sideways(window: Browser, site: Path, route: str, width: int) -> None:
    window.size(width)
    window.open(address(site, route))
    wide = window.run("return [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide[0] <= wide[1]


LUMINANCE = """
const luminance = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
return [...document.querySelectorAll(".ramp [class]")].map((step) => {
  const style = getComputedStyle(step);
  return [luminance(style.backgroundColor), luminance(style.color)];
});
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_legible_on_every_step_of_the_ramp(window: Browser, site: Path, theme: str) -> None:
    """4.5 to 1, as WCAG 2.2 asks for text; and the steps differ in luminance alone, in one direction."""
    window.prefer(theme)
    window.open(address(site, "#/2/1"))
    steps = window.run(LUMINANCE)
    contrasts = [(max(pair) + 0.05) / (min(pair) + 0.05) for pair in steps]
    assert len(steps) == 8 and min(contrasts) >= 4.5
    grounds = [ground for ground, _ in steps]
    assert grounds == sorted(grounds, reverse=theme == "light")


def test_the_page_may_load_nothing_from_elsewhere(window: Browser, site: Path) -> None:
    """Not even if a script in it wanted to."""
    window.open(address(site))
    program = """
    const done = arguments[arguments.length - 1];
    addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
    document.body.append(Object.assign(new Image(), { src: "https://example.invalid/x.png" }));
    """
    assert window.driver.execute_async_script(program) == "img-src"


@pytest.mark.skipif("AXE_CORE" not in os.environ, reason="AXE_CORE does not name axe-core's axe.min.js")
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("route", ROUTES[:5])
def test_axe_finds_nothing_serious(window: Browser, site: Path, route: str, width: int, theme: str) -> None:
    window.prefer(theme)
    window.size(width)
    window.open(address(site, route))
    window.run("for (const node of document.querySelectorAll('details')) node.open = true")
    window.run(Path(os.environ["AXE_CORE"]).read_text(encoding="utf-8"))
    found = window.driver.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
    assert found["passes"]
    assert [f"{v['impact']}: {v['id']}: {v['nodes'][0]['html']}" for v in found["violations"]] == []
