"""The page in a real browser without a window: Debian's packages chromium and chromium-driver."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from restyle_deploy.bench.page import write_page
from restyle_deploy.bench.report import write_report
from tests.bench.reports import made_up_report, write_made_up_images

WIDTHS = {"phone": (375, 812), "desktop": (1280, 900)}
# Points lie on one another where several lines meet; this one lies alone.
LINE, STEPS = "onnxruntime-cpu-fp32-plain-b1", 3
DECISION = made_up_report().decision
FRONT = DECISION.pareto if DECISION is not None else ()
# Samples of a call in medians: a quarter of them are thrice as long, and one much longer.
TAIL = (*[1.0] * 12, *[3.0] * 7, 9.0)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of the made-up report's page."""
    folder = tmp_path_factory.mktemp("page")
    report = made_up_report()
    write_report(report, folder / "report.json")
    write_made_up_images(folder, report)
    return write_page(folder / "report.json", folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = chromium
    # In a container its sandbox cannot be set up, and /dev/shm is small; the page is our own.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = Chrome(options=options, service=ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture(params=WIDTHS)
def shown(browser: Chrome, page: str, request: pytest.FixtureRequest) -> Iterator[Chrome]:
    """The page, freshly opened at a phone's or a desktop's width; nothing may be said in the console."""
    width, height = WIDTHS[request.param]
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": request.param == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page)
    WebDriverWait(browser, 20).until(lambda driver: driver.find_elements(By.CSS_SELECTOR, "#chart .point"))
    yield browser
    assert browser.get_log("browser") == []


def run(browser: Chrome, script: str, *arguments: object) -> Any:
    return browser.execute_script(script, *arguments)


def point_of(browser: Chrome, line: str = LINE, steps: int = STEPS) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, f'#chart g[data-name="{line}"] .point[data-steps="{steps}"]')


def point_at(browser: Chrome, element: WebElement) -> None:
    run(browser, "arguments[0].scrollIntoView({block: 'center'})", browser.find_element(By.ID, "chart"))
    ActionChains(browser).move_to_element(element).perform()


def first_cells(table: WebElement, column: int) -> list[str]:
    return [cell.text for cell in table.find_elements(By.CSS_SELECTOR, f"tbody td:nth-child({column})")]


def test_nothing_is_fetched_and_nothing_is_wider_than_the_screen(shown: Chrome) -> None:
    fetched = run(shown, "return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []
    assert run(shown, "return document.documentElement.scrollWidth <= innerWidth")
    assert run(shown, "return [...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_pointing_at_a_mark_shows_its_figures(shown: Chrome) -> None:
    tip = shown.find_element(By.ID, "tip")
    assert not tip.is_displayed()
    point_at(shown, point_of(shown))
    lines = tip.text.splitlines()
    row = made_up_report().configurations[1].rows[2]
    assert lines[0] == "onnxruntime, plain: 3 steps"
    latency, mse = row.latency, row.quality["mse"]
    assert lines[1] == f"{latency.median_ms:.2f} ms median of a call, IQR {latency.iqr_ms:.2f} ms"
    bound = f"(bound {max(latency.samples_ms):.2f})"
    assert lines[2] == f"p90 {latency.p90_ms:.2f}, p95 {latency.p95_ms:.2f} {bound}, p99 {latency.p99_ms:.2f} ms"
    assert f"of the images: median {mse.median:.4f}, 5th {mse.p5:.4f}, 95th {mse.p95:.4f} percentile" in lines
    assert lines[-1].startswith(f"SSIM: {row.quality['ssim'].mean:.3f} (")
    inside = "const a = arguments[0].getBoundingClientRect(); return a.left >= 0 && a.right <= innerWidth && a.top >= 0"
    assert run(shown, inside, tip)
    apart = (
        "const [a, b] = [...arguments].map((item) => item.getBoundingClientRect());"
        "return a.bottom < b.top || a.top > b.bottom || a.right < b.left || a.left > b.right"
    )
    assert run(shown, apart, tip, point_of(shown))
    point_at(shown, shown.find_element(By.TAG_NAME, "h1"))
    assert not tip.is_displayed()


def test_arrow_keys_go_through_the_points(shown: Chrome) -> None:
    tip = shown.find_element(By.ID, "tip")
    run(shown, "document.getElementById('chart').focus()")
    shown.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert tip.text.startswith("onnxruntime: 1 step\n")
    shown.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert tip.text.startswith("onnxruntime: 2 steps\n")
    shown.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()


def test_a_line_can_be_hidden_and_shown(shown: Chrome) -> None:
    button = shown.find_element(By.CSS_SELECTOR, f'#legend button[data-name="{LINE}"]')
    selector = f'#chart g[data-name="{LINE}"]'
    for state, lines in (("false", 0), ("true", 1)):
        run(shown, "arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()
        assert button.get_attribute("aria-pressed") == state
        assert len(shown.find_elements(By.CSS_SELECTOR, selector)) == lines
        assert len(shown.find_elements(By.CSS_SELECTOR, "#chart g.line")) == 6 + lines


def test_all_lines_can_be_hidden(shown: Chrome) -> None:
    for button in shown.find_elements(By.CSS_SELECTOR, "#legend button"):
        run(shown, "arguments[0].click()", button)
    assert shown.find_element(By.ID, "chart").text == "No line is shown."


def test_axis_is_logarithmic_or_not(shown: Chrome) -> None:
    def places() -> list[float]:
        points = [point_of(shown, steps=steps) for steps in (1, 2, 3)]
        return [float(point.rect["x"]) for point in points]

    first, second, third = places()
    assert second - first > 1.3 * (third - second)  # twice as long, then one and a half times
    log = shown.find_element(By.ID, "log")
    run(shown, "arguments[0].scrollIntoView({block: 'center'})", log)
    log.click()
    first, second, third = places()
    assert second - first == pytest.approx(third - second, abs=1.5)


def test_another_metric_and_another_latency_are_drawn(shown: Chrome) -> None:
    before = point_of(shown).get_attribute("transform")
    Select(shown.find_element(By.ID, "metric")).select_by_value("ssim")
    assert "SSIM, higher is better" in shown.find_element(By.ID, "chart").text
    assert point_of(shown).get_attribute("transform") != before
    Select(shown.find_element(By.ID, "latency")).select_by_value("image")
    assert "latency per image, median, ms" in shown.find_element(By.ID, "chart").text


def test_budget_is_drawn_where_it_is_held_against(shown: Chrome) -> None:
    latency = Select(shown.find_element(By.ID, "latency"))
    counts = {}
    for value in ("median", "image", "p95"):
        latency.select_by_value(value)
        counts[value] = len(shown.find_elements(By.CSS_SELECTOR, "#chart .budget"))
    assert counts == {"median": 0, "image": 0, "p95": 1}
    assert "budget 20 ms" in shown.find_element(By.ID, "chart").text


def test_front_is_ringed_for_the_metric_that_it_was_judged_by(shown: Chrome) -> None:
    assert shown.find_elements(By.CSS_SELECTOR, "#chart .front") == []
    Select(shown.find_element(By.ID, "metric")).select_by_value("ssim")
    rings = shown.find_elements(By.CSS_SELECTOR, "#chart .front")
    places = {(float(ring.get_attribute("cx") or 0), float(ring.get_attribute("cy") or 0)) for ring in rings}
    expected = set()
    for name, steps in FRONT:
        place = point_of(shown, line=name, steps=steps).get_attribute("transform") or ""
        x, y = place.removeprefix("translate(").removesuffix(")").split(",")
        expected.add((float(x), float(y)))
    assert {(round(x, 1), round(y, 1)) for x, y in places} == expected


def test_bars_end_within_the_axes(browser: Chrome, tmp_path: Path) -> None:
    """Of a median with a far quartile, and of a p95 with a far bound."""
    report = made_up_report()
    result = report.configurations[2]
    rows = tuple(
        replace(row, latency=replace(row.latency, samples_ms=tuple(row.latency.median_ms * factor for factor in TAIL)))
        for row in result.rows
    )
    report = replace(report, configurations=(replace(result, rows=rows),), decision=None)
    write_report(report, tmp_path / "report.json")
    browser.get(write_page(tmp_path / "report.json", tmp_path / "report.html").as_uri())
    WebDriverWait(browser, 20).until(lambda driver: driver.find_elements(By.CSS_SELECTOR, "#chart .point"))
    right = run(browser, "return document.querySelector('#chart .axis').getBBox()")
    for _ in range(2):
        for value in ("median", "image", "p95"):
            Select(browser.find_element(By.ID, "latency")).select_by_value(value)
            ends = run(browser, "return [...document.querySelectorAll('#chart .bar')].map((it) => it.x2.baseVal.value)")
            assert len(ends) == 2 * len(rows)
            assert max(ends) <= right["x"] + right["width"]
        run(browser, "document.getElementById('log').click()")


def test_tables_sort_by_figures_and_by_words(shown: Chrome) -> None:
    table = shown.find_element(By.CSS_SELECTOR, "#results table")
    header = table.find_elements(By.TAG_NAME, "th")[2]
    for state, is_falling in (("ascending", False), ("descending", True)):
        run(shown, "arguments[0].click()", header.find_element(By.TAG_NAME, "button"))
        assert header.get_attribute("aria-sort") == state
        medians = [float(text.lstrip("! ")) for text in first_cells(table, 3)]
        assert medians == sorted(medians, reverse=is_falling)
        assert len(medians) == 30
    run(shown, "arguments[0].click()", table.find_element(By.CSS_SELECTOR, "th button"))
    assert first_cells(table, 1) == sorted(first_cells(table, 1))


def test_rows_without_a_figure_come_last_either_way(shown: Chrome) -> None:
    table = shown.find_element(By.CSS_SELECTOR, "#results table")
    button = table.find_elements(By.CSS_SELECTOR, "th button")[8]
    for _ in range(2):
        run(shown, "arguments[0].click()", button)
        texts = first_cells(table, 9)
        assert texts[5:] == ["-"] * 25
        assert "-" not in texts[:5]


def test_difference_maps_can_be_hidden(shown: Chrome) -> None:
    picture = shown.find_element(By.CSS_SELECTOR, "#images img.map")
    assert picture.is_displayed()
    run(shown, "arguments[0].click()", shown.find_element(By.ID, "show-maps"))
    assert not picture.is_displayed()
    assert shown.find_element(By.CSS_SELECTOR, "#images img.picture").is_displayed()


def test_a_page_without_metrics_says_so(browser: Chrome, tmp_path: Path) -> None:
    report = made_up_report()
    bare = [
        type(result)(configuration=result.configuration, status="failed", reason="out of memory")
        for result in report.configurations
    ]
    write_report(type(report)(**{**vars(report), "configurations": tuple(bare)}), tmp_path / "report.json")
    browser.get(write_page(tmp_path / "report.json", tmp_path / "report.html").as_uri())
    WebDriverWait(browser, 20).until(lambda driver: driver.find_element(By.ID, "chart").text)
    assert browser.find_element(By.ID, "chart").text == "No metric has figures."
    assert browser.get_log("browser") == []
