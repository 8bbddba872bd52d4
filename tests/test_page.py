"""benchmark/page.html, as its readers meet it in a browser (Debian's chromium)."""

import os
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.support.ui import Select

from benchmark import ROOT, page

PAGE = ROOT / "benchmark/page.html"


def test_the_page_is_what_the_command_writes():
    assert PAGE.read_text() == page.make_page(), "run: python -m benchmark.page"
    assert PAGE.stat().st_size < 1_500_000


@pytest.fixture(scope="module")
def chromium():
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        message = "no browser here: apt-get install chromium chromium-driver"
        assert "BROWSER_REQUIRED" not in os.environ, message  # .ci/run sets it
        pytest.skip(message)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")  # without which root cannot start it
    options.add_argument("--window-size=1600,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield browser
    browser.quit()


@pytest.fixture
def browser(chromium):
    """The page, just opened. No test may leave a message on its console, or load anything more."""
    chromium.get("about:blank")
    chromium.get(PAGE.as_uri())
    yield chromium
    assert chromium.get_log("browser") == []
    assert chromium.execute_script("return performance.getEntriesByType('resource')") == []


def find(browser, css):
    return browser.find_elements("css selector", css)


def texts(browser, css):
    script = "return [...document.querySelectorAll(arguments[0])].map((x) => x.textContent)"
    return browser.execute_script(script, css)


def test_two_scripts_are_chosen_read_side_by_side_and_what_is_the_same_unfolds(browser):
    for side, name in (("a", "lps"), ("b", "mf_bon")):
        Select(find(browser, f"#{side}")[0]).select_by_visible_text(name)
    for side, name in (("a", "lps"), ("b", "mf_bon")):
        assert texts(browser, f".lines .{side}") == (ROOT / f"{name}.py").read_text().splitlines()
    assert texts(browser, ".same .a") == texts(browser, ".same .b")
    assert all(find(browser, css)[0].is_displayed() for css in (".change .a", ".change .b", "mark"))
    fold = find(browser, "details:not([open])")[-1]
    line = fold.find_elements("css selector", ".a")[-1]
    assert not line.is_displayed()
    fold.find_element("css selector", "summary").click()
    assert line.is_displayed()


@pytest.mark.parametrize("links", ["#family td a", "#lessons a"])
def test_links_lead_to_diffs_and_keys_step_through_them(browser, links):
    find(browser, links)[-2].click()
    a, b = browser.current_url.partition("#")[2].split("/")
    assert f"{a}.py and {b}.py: {page.count_changes(a, b)} changed" in texts(browser, "h1")[0]
    find(browser, "body")[0].send_keys("nnp")
    changes = find(browser, ".change")
    assert find(browser, ".current") == [changes[0]]
    assert texts(browser, "#where") == [f"change 1 of {len(changes)}"]


@pytest.mark.parametrize("method", ["lps", "published IFQL"])
def test_a_method_is_switched_off_and_on_in_the_chart(browser, method):
    find(browser, "[name=task]")[-1].click()  # one with published curves
    images = []
    for _ in range(3):
        script = "return document.querySelector('#chart canvas').toDataURL()"
        images.append(browser.execute_script(script))
        find(browser, f"[value='{method}']")[0].click()
    assert images[0] == images[2] != images[1]
