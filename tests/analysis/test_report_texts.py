"""The report with texts that could break a page, and with more latents than rows in sight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sae.analysis import Atlas, write_report
from sae.analysis.features import HISTOGRAM_BINS, Features
from sae.analysis.neighbours import Neighbours

playwright_api = pytest.importorskip("playwright.sync_api")
expect = playwright_api.expect
D_SAE = 3000
TEXTS = ["<bos>", "</script><b id=x>", " &amp;", "\n", " ", "⟨F0 9F⟩", "⟨99 82⟩", " word"]
TEXTS += ["⟨E2⟩", "\u200b"]
# What a reader sees of one context of all these tokens: the smiling face is joined, the lone
# byte, the newline and the zero-width space are visible.
SEEN = "<bos></script><b id=x> &amp;↵·‥🙂 word⟨E2⟩U+200B"
pytestmark = pytest.mark.browser


def make_atlas() -> Atlas:
    """Return an atlas whose latent j has one context of all TEXTS and fires j + 1 times."""
    n, left = len(TEXTS), 3
    tokens = torch.arange(n, dtype=torch.int32).expand(D_SAE, 1, n).contiguous()
    activations = torch.zeros(D_SAE, 1, n)
    activations[:, 0, left] = torch.arange(1, D_SAE + 1)
    activations[:, 0, 7] = 0.25 * torch.arange(1, D_SAE + 1)
    histogram = torch.zeros(D_SAE, HISTOGRAM_BINS, dtype=torch.int64)
    counts = torch.arange(1, D_SAE + 1)
    histogram[:, 50] = counts
    ids = torch.zeros(D_SAE, 1, dtype=torch.int64)
    features = Features(
        10_000, 5, left, counts, histogram, activations.amax(2), ids, tokens, activations
    )
    near = Neighbours((torch.arange(D_SAE)[:, None] + 1) % D_SAE, torch.full((D_SAE, 1), 0.5))
    return Atlas(features, None, near, dict(enumerate(TEXTS)), ("No logit effects: <none>",))


@pytest.fixture(scope="module")
def report_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of an atlas alone: the folder holds no configuration, no log, no results."""
    return write_report(tmp_path_factory.mktemp("alone"), make_atlas())


@pytest.fixture
def page(browser, report_path: Path) -> Iterator:
    context = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="light")
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.goto(report_path.as_uri())
    page.wait_for_selector("html[data-ready]")
    yield page
    assert errors == []
    context.close()


def test_texts_are_shown_as_they_are(page):
    assert page.locator("#x").count() == 0
    assert page.locator("#card .context-text").first.inner_text().strip("… ") == SEEN
    assert "No logit effects: <none>" in page.inner_text("#latents")
    assert page.locator("#scope option[value=promoted]").count() == 0


def test_activations_are_exact_on_hover(page):
    page.select_option("#sort", "id")
    page.click("#row-6")
    page.locator("#card .token.is-peak").hover()
    expect(page.locator("#tip b")).to_have_text("7")
    page.locator("#card .token", has_text="word").hover()
    expect(page.locator("#tip b")).to_have_text("1.75")


def test_only_rows_in_sight_exist_and_all_can_be_reached(page):
    page.select_option("#sort", "id")
    assert page.locator("#rows .row").count() < 60
    page.evaluate("document.getElementById('list').scrollTop = 1e9")
    expect(page.locator(f"#row-{D_SAE - 1}")).to_be_visible()
    assert page.locator("#rows .row").count() < 60


def test_the_keyboard_searches_moves_and_opens(page):
    page.select_option("#sort", "id")
    page.locator("#list").focus()
    page.keyboard.press("/")
    expect(page.locator("#search")).to_be_focused()
    page.keyboard.type("#12")
    page.keyboard.press("Enter")  # sooner than a search waits for more letters
    assert page.url.endswith("#latent=12")
    expect(page.locator("#count")).to_contain_text(" of 3,000")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#card h3").first).to_have_text("Latent 120")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#card h3").first).to_have_text("Latent 12")
    page.keyboard.press("Escape")
    expect(page.locator("#search")).not_to_be_focused()


def test_links_and_back_follow_the_address(page):
    page.select_option("#sort", "id")
    page.click("#row-4")
    page.click("#card .nearest a")
    expect(page.locator("#card h3").first).to_have_text("Latent 5")
    page.go_back()
    expect(page.locator("#card h3").first).to_have_text("Latent 4")


def test_the_theme_can_be_switched(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.click("#theme")
    assert page.evaluate(ground) != light
    page.click("#theme")
    assert page.evaluate(ground) == light


def test_the_page_forbids_itself_the_network(report_path: Path):
    text = report_path.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
