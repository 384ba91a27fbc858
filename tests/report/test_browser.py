"""The page as a reader gets it: opened from disk in a real browser."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator

import pytest

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

from fastsft.report import write_report  # noqa: E402

_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,1000"
)


@pytest.fixture(scope="module")
def browser(make_run, tmp_path_factory) -> Iterator:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        if os.environ.get("CI") == "true":
            pytest.fail("chromium and chromedriver must be installed where CI=true")
        pytest.skip("needs chromium and chromedriver, which are not installed")
    folder = tmp_path_factory.mktemp("browser")
    page = write_report(make_run(folder / "run", tokens=True, planted=True, mix=True, samples=24).out)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*_FLAGS.split(), f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        browser.get(page.as_uri())
        WebDriverWait(browser, 20).until(lambda b: b.find_element(By.TAG_NAME, "body").get_attribute("data-drawn"))
        yield browser
    finally:
        browser.quit()


def _rows(browser) -> list[str]:
    return [row.get_attribute("data-id") for row in browser.find_elements(By.CSS_SELECTOR, "#rows tr")]


def _numbers(browser) -> list[float]:
    cells = browser.find_elements(By.CSS_SELECTOR, "#rows td:first-child")
    return [float(cell.text.replace("−", "-")) for cell in cells]


def _search(browser, words: str) -> None:
    field = browser.find_element(By.ID, "search")
    field.clear()
    field.send_keys(words)


def _sort(browser, key: str) -> None:
    browser.find_element(By.CSS_SELECTOR, f"th[data-key={key}] button").click()


def _open_first(browser) -> None:
    browser.find_element(By.CSS_SELECTOR, "#rows summary").click()
    # the text is put in when the browser reports that the row has opened
    WebDriverWait(browser, 5).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#rows .text"))


@pytest.fixture(autouse=True)
def fresh(browser) -> None:
    """Every test starts from the state of the page when it opens, and sorts by phi, helpful first."""
    _search(browser, "x")
    browser.find_element(By.ID, "search").send_keys("\b")
    Select(browser.find_element(By.ID, "pick-ability")).select_by_value("maths")
    Select(browser.find_element(By.ID, "pick-source")).select_by_value("")
    _sort(browser, "id")
    _sort(browser, "phi")


def test_every_chart_is_drawn(browser):
    places = browser.find_elements(By.CSS_SELECTOR, "[data-chart]")
    assert len(places) == 3 * 2 + 6 + 5
    for place in places:
        marks = place.find_elements(By.CSS_SELECTOR, "svg .mark-group path, svg .mark-line path, svg .mark-symbol path")
        assert marks, place.get_attribute("id")
        assert place.size["height"] > 100


def test_nothing_wider_than_a_phone(browser):
    size = {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert browser.execute_script("return document.documentElement.scrollWidth") == 400
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_reason_of_a_decision_is_shown_as_text_and_does_not_run(browser):
    cells = browser.find_elements(By.CSS_SELECTOR, ".decisions td[dir=auto]")
    assert len(cells) == 6
    assert cells[0].text.endswith("<script>window.injected = 1; alert(1)</script>")
    assert browser.execute_script("return window.injected") is None


def test_decisions_are_stacked_on_a_phone(browser):
    cells = browser.find_elements(By.CSS_SELECTOR, ".decisions tbody tr:first-child > *")
    assert cells[0].location["y"] == cells[2].location["y"]
    size = {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        tops = [cell.location["y"] for cell in cells]
        assert tops == sorted(set(tops))
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_search_keeps_only_rows_that_hold_the_words(browser):
    assert len(_rows(browser)) == 20
    _search(browser, "GSM8K-7")
    assert _rows(browser) == ["gsm8k-7"]
    _search(browser, "answer 9")
    assert set(_rows(browser)) == {"gsm8k-9", "wikisql-9", "chat-9", "end-9"}
    _search(browser, "no such words")
    assert _rows(browser) == []
    assert browser.find_element(By.ID, "page").text == "nothing found"


def test_source_filter_keeps_only_that_source(browser):
    Select(browser.find_element(By.ID, "pick-source")).select_by_value("chat")
    rows = _rows(browser)
    assert rows
    assert all(row.startswith("chat-") for row in rows)


def test_sort_by_phi_both_ways(browser):
    rising = _numbers(browser)
    assert rising == sorted(rising)
    assert rising[0] < 0
    _sort(browser, "phi")
    falling = _numbers(browser)
    assert falling == sorted(falling, reverse=True)
    assert falling[0] > 0
    head = browser.find_element(By.CSS_SELECTOR, "th[data-key=phi]")
    assert head.get_attribute("aria-sort") == "descending"


def test_pages_cover_every_row_once(browser):
    seen = []
    while True:
        seen += _rows(browser)
        following = browser.find_element(By.ID, "next")
        if not following.is_enabled():
            break
        following.click()
    assert len(seen) == len(set(seen)) == 96


def test_ability_selector_switches_the_numbers(browser):
    maths = dict(zip(_rows(browser), _numbers(browser), strict=True))
    Select(browser.find_element(By.ID, "pick-ability")).select_by_value("code")
    code = dict(zip(_rows(browser), _numbers(browser), strict=True))
    assert code
    assert code != maths
    assert "helped code" in browser.find_element(By.ID, "shown").text


def test_markup_in_a_sample_is_shown_as_text_and_does_not_run(browser):
    _search(browser, "gsm8k-0")
    _open_first(browser)
    texts = [node.text for node in browser.find_elements(By.CSS_SELECTOR, "#rows .text")]
    assert texts[1] == "<script>window.injected = 1; alert(1)</script>"
    tokens = browser.find_elements(By.CSS_SELECTOR, "#rows .heat span")
    assert [token.text.strip() for token in tokens] == [
        "What does this do?",
        "<script>window.injected = 1; alert(1)</script>",
    ]
    assert browser.execute_script("return window.injected") is None
    assert not browser.find_elements(By.CSS_SELECTOR, "#rows script, #rows b")


def test_right_to_left_text_runs_right_to_left(browser):
    _search(browser, "مرحبا")
    _open_first(browser)
    response = browser.find_elements(By.CSS_SELECTOR, "#rows .text")[1]
    assert response.value_of_css_property("direction") == "rtl"


def test_no_error_and_no_request_but_the_page(browser):
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    # the log also holds the empty tab the browser opens with
    asked = {request["request"]["url"] for request in requests if request["documentURL"] == browser.current_url}
    assert browser.current_url in asked
    assert {url for url in asked if not url.startswith("data:")} == {browser.current_url}
