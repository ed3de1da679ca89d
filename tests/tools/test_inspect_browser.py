"""The page in a real browser: Chromium without a window, from Debian's `chromium` and `chromium-driver`."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from transformers_resps.tools.inspect import page, page_data

from .examples import FACTS, decode, examination
from .test_inspect_page import SPITE, spiteful_data


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER),
    reason="no browser: as root on Debian, `make browser` installs chromium and chromium-driver",
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


class Page:
    """One page in the browser, asked and handled as a person would."""

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver, self._folder = driver, folder

    def open(self, data: dict[str, Any], width: int = 1280, height: int = 900, scheme: str = "light") -> "Page":
        file = self._folder / "page.html"
        file.write_text(page(data), encoding="utf-8")
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get(file.as_uri())
        return self

    def text(self, selector: str) -> str:
        return str(self.driver.find_element(By.CSS_SELECTOR, selector).text)

    def texts(self, selector: str) -> list[str]:
        return [found.text for found in self.driver.find_elements(By.CSS_SELECTOR, selector)]

    def step(self, number: int) -> Any:
        return self.driver.find_elements(By.CSS_SELECTOR, "[role=option]")[number]

    def tap(self, number: int) -> None:
        """On a phone the panel covers the lower half: bring the step up first, as a thumb would."""
        step = self.step(number)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'start'})", step)
        step.click()

    def unfold(self) -> None:
        """Show the whole panel, where it began folded."""
        fold = self.driver.find_element(By.ID, "fold")
        if fold.is_displayed():
            fold.click()

    def point_at(self, element: Any) -> None:
        ActionChains(self.driver).move_to_element(element).perform()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def ask(self, expression: str) -> Any:
        return self.driver.execute_script(f"return {expression}")

    @property
    def title(self) -> str:
        return self.text("#step-title")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver: Any, tmp_path: Path) -> Iterator[Page]:
    """Whatever a test does, the console stays empty."""
    yield Page(driver, tmp_path)
    assert driver.get_log("browser") == []


def data() -> dict[str, Any]:
    return page_data(examination(), decode, "what?", FACTS)


def long_data() -> dict[str, Any]:
    """Eighty steps, texts without spaces, a name that does not fit a phone, a deep chain and wide numbers."""
    made = data()
    made["facts"] |= {"target": "organisation/" + "n" * 80, "policy": "Policy(" + "x" * 90 + ")"}
    made["prompt"] = "w" * 200
    made["sameText"] = {"same": False, "position": 2, "plain": "x" * 60, "own": "y" * 60}
    made["sameText"] |= {"gap": 0.125, "spacing": 0.125, "dtype": "bfloat16", "explained": True}
    deep = made["steps"][1]
    last = deep["nodes"][-1]
    for depth in range(4, 17):
        deep["nodes"].append(last | {"parent": len(deep["nodes"]) - 1, "depth": depth, "text": "z" * 40})
    deep["seconds"] = {"draft": 123.4567, "verify": 234.5678, "rest": 345.6789}
    deep["seen"] |= {"context": 1234567, "room": 1234567}
    deep["tokens"][0]["text"] = "v" * 150
    made["steps"] += made["steps"][1:] * 40
    return made


def test_it_opens_at_the_step_that_won_most(browser: Page) -> None:
    browser.open(data())
    assert browser.title == "Step 1 of 2: 2 accepted"
    assert browser.text("#answer") == "helpz"
    assert browser.text("#prompt") == "what?"
    assert browser.texts("#figures dd:first-of-type") == ["1.67", "5.0", "97%", "yes"]
    assert browser.ask("document.title") == "tiny, step by step"


def test_the_tree_shows_every_node_its_fate_and_its_probabilities(browser: Page) -> None:
    browser.open(data())
    rows = browser.ask(
        "[...document.querySelectorAll('#tree li')].map((item) => [item.className, "
        "item.querySelector('.chip').textContent, "
        "...[...item.firstChild.querySelectorAll('.number')].map((number) => number.textContent)])"
    )
    assert rows == [
        ["root root", "h"],
        ["accepted both", "e", "90%", "90%"],
        ["accepted both", "l", "67%", "60%"],
        ["bonus", "p"],
        ["rejected lookup", "i", "50%", "30%"],
        ["rejected head", "a", "25%", "25%"],
    ]
    assert browser.text("#tree-key") == "3 from the head, 1 looked up (dashed); 2 accepted."


def test_what_the_policy_saw_and_decided_and_the_seconds_are_told(browser: Page) -> None:
    browser.open(data())
    assert browser.texts("#seen dd") == ["8 tokens", "0", "20 tokens", "90% 60% 30%"]
    assert browser.texts("#decided dd") == ["4/2/2+3", "2 of 2", "9 nodes", "5 nodes"]
    assert browser.texts("#times b") == ["10.0 ms", "30.0 ms", "5.0 ms", "45.0 ms"]


def test_pointing_at_a_step_shows_it_and_leaving_brings_the_kept_one_back(browser: Page) -> None:
    browser.open(data())
    browser.point_at(browser.step(2))
    assert browser.title == "Step 2 of 2: plain"
    assert browser.text("#tree-key") == "Nothing drafted: a plain step."
    browser.point_at(browser.driver.find_element(By.ID, "title"))
    assert browser.title == "Step 1 of 2: 2 accepted"


def test_a_click_keeps_a_step(browser: Page) -> None:
    browser.open(data())
    browser.step(0).click()
    browser.point_at(browser.driver.find_element(By.ID, "title"))
    assert browser.title == "Step 0 of 2: prefill"
    assert browser.texts("#tree li") == []
    assert [option.get_attribute("aria-selected") for option in map(browser.step, range(3))] == [
        "true",
        "false",
        "false",
    ]


def test_a_bar_is_a_step_too(browser: Page) -> None:
    browser.open(data())
    browser.driver.find_elements(By.CSS_SELECTOR, "#bars > span")[2].click()
    assert browser.title == "Step 2 of 2: plain"


def test_the_keyboard_reaches_every_step_and_the_focus_is_seen(browser: Page) -> None:
    browser.open(data())
    browser.press(*[Keys.TAB] * 2)  # the prompt, then the answer's one stop
    assert browser.ask("document.activeElement.dataset.step") == "1"
    seen = []
    for key in (Keys.HOME, *[Keys.ARROW_RIGHT] * 3, Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.END, Keys.PAGE_UP):
        browser.press(key)
        seen.append(int(browser.title.split()[1]))
        assert browser.ask("document.activeElement.dataset.step") == str(seen[-1])
        assert browser.ask("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert browser.ask("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2
    assert seen == [0, 1, 2, 2, 1, 0, 2, 0]
    assert browser.ask("document.querySelectorAll('#answer [tabindex=\"0\"]').length") == 1


def test_a_reader_of_screens_is_told_what_a_step_did(browser: Page) -> None:
    browser.open(data())
    assert browser.step(1).aria_role == "option"
    assert browser.step(1).accessible_name == "Step 1: accepted “el”, then bonus token “p”"
    assert browser.ask("document.querySelector('#answer').getAttribute('role')") == "listbox"
    assert browser.ask("document.querySelector('#step-title').getAttribute('aria-live')") == "polite"
    spoken = browser.ask("document.querySelector('#tree li.rejected .unseen').textContent")
    assert spoken == " rejected, looked up, "


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_leaves_the_page_sideways(browser: Page, width: int) -> None:
    browser.open(long_data(), width=width, height=740)
    browser.unfold()
    for number in (1, 2, 0):
        browser.tap(number)
        assert browser.title.startswith(f"Step {number} of")
        assert browser.ask("document.documentElement.scrollWidth") <= width
        panel = "document.getElementById('panel')"
        right = browser.ask(f"{panel}.getBoundingClientRect().left + {panel}.clientLeft + {panel}.clientWidth")
        assert (
            browser.ask(
                "[...document.querySelectorAll('#panel *:not(.unseen)')].filter((part) => "
                f"part.getBoundingClientRect().right > {right} + 0.5 && !part.closest('#step-text'))"
                ".map((part) => part.className + part.textContent)"
            )
            == []
        )
    assert browser.ask("parseFloat(getComputedStyle(document.querySelector('#answer .token')).fontSize)") >= 14


def test_on_a_phone_the_panel_begins_folded(browser: Page) -> None:
    browser.open(data(), width=420, height=740)
    height = "document.getElementById('panel').getBoundingClientRect().height"
    assert browser.ask(height) < 110 and not browser.text("#tree") and browser.title.startswith("Step ")
    assert browser.ask("document.getElementById('fold').getAttribute('aria-expanded')") == "false"
    browser.unfold()
    assert browser.ask(height) > 300 and browser.text("#fold") == "Hide step"
    browser.tap(2)
    browser.driver.find_element(By.ID, "fold").click()
    assert browser.ask(height) < 110 and browser.title.startswith("Step 2")


def test_beside_the_text_the_panel_is_whole(browser: Page) -> None:
    browser.open(data())
    assert browser.text("#tree") and not browser.driver.find_element(By.ID, "fold").is_displayed()


@pytest.mark.parametrize("width", [360, 1280])
def test_choosing_steps_moves_nothing_of_the_text(browser: Page, width: int) -> None:
    browser.open(data(), width=width, height=740)
    places = (
        "[...document.querySelectorAll('[role=option], #bars, h2, footer')].map((part) => "
        "[part.getBoundingClientRect().left, part.getBoundingClientRect().top + scrollY].join())"
        ".join(';')"
    )
    still = places.replace("h2,", "h2:not(#step-title),")
    before = browser.ask(still)
    for number in (2, 0, 1):
        browser.driver.execute_script("document.querySelectorAll('[role=option]')[arguments[0]].click()", number)
        assert browser.ask(still) == before


def test_spite_stays_text(browser: Page) -> None:
    browser.open(spiteful_data())
    assert browser.ask("document.images.length") == 0
    assert browser.ask("document.scripts.length") == 2
    assert browser.ask("document.title") == f"{SPITE}, step by step"
    assert browser.ask("document.getElementById('prompt').textContent") == SPITE
    assert SPITE in browser.ask("document.querySelector('#tree .chip').title")


def test_dark_and_light_follow_the_reader_and_both_can_be_read(browser: Page) -> None:
    papers = set()
    for scheme in ("light", "dark"):
        browser.open(data(), scheme=scheme)
        paper = colour(browser.ask("getComputedStyle(document.body).backgroundColor"))
        papers.add(paper)
        for selector in ("#answer", ".eyebrow", "footer", "#figures dd", "#prompt", "#seen dt"):
            ink = colour(browser.ask(f"getComputedStyle(document.querySelector('{selector}')).color"))
            assert contrast(ink, paper) >= 4.5, (scheme, selector)
        for source in ("both", "target"):
            style = f"getComputedStyle(document.querySelector('#answer .token.{source}'))"
            ground = browser.ask(f"{style}.backgroundColor")
            behind = paper if ground == "rgba(0, 0, 0, 0)" else colour(ground)
            assert contrast(colour(browser.ask(f"{style}.color")), behind) >= 4.5, (scheme, source)
    assert len(papers) == 2


def colour(css: str) -> tuple[float, ...]:
    """`rgb(1, 2, 3)` -> its three channels."""
    return tuple(float(part) for part in css[css.index("(") + 1 : -1].split(",")[:3])


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """The ratio of WCAG 2.2, which asks for 4.5 in running text."""

    def luminance(channels: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in channels)]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
