"""The report in a real browser: search, sort, open a latent; no error, no request."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae.analysis import OpenedRun
from sae.evals.results import read_results

playwright_api = pytest.importorskip("playwright.sync_api")
expect = playwright_api.expect
pytestmark = pytest.mark.browser


class Page:
    """A loaded report with everything it said and asked for."""

    def __init__(self, page):
        self.page, self.errors, self.requests = page, [], []
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def rows(self) -> list[int]:
        """Return the latents of the rows in sight, top to bottom."""
        return self.page.eval_on_selector_all(
            "#rows .row",
            "rows => rows.sort((a, b) => a.offsetTop - b.offsetTop)"
            ".map(row => Number(row.dataset.latent))",
        )


@pytest.fixture(params=[("light", 1440, 900), ("dark", 390, 844)], ids=["wide", "narrow"])
def opened_page(request: pytest.FixtureRequest, browser, reported_run: Path) -> Iterator[Page]:
    scheme, width, height = request.param
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height})
    page = Page(context.new_page())
    page.page.goto((reported_run / "report.html").as_uri())
    page.page.wait_for_selector("html[data-ready]")
    yield page
    assert page.errors == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in page.requests)
    context.close()


def test_everything_is_there_and_nothing_overflows(opened_page: Page):
    page = opened_page.page
    text = page.inner_text("main")
    for words in ("FVU", "Loss recovered", "Training", "Evaluation", "Latents", "96 latents"):
        assert words in text
    assert page.locator("#main-curves svg").count() >= 3
    assert page.locator("#rates svg").count() == 1
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(overflow) <= 0


def test_sort_orders_the_list(opened_page: Page, opened_run: OpenedRun):
    page, features = opened_page.page, opened_run.atlas.features
    assert opened_run.atlas.effects is not None
    keys = {
        "rate": features.firing_counts.double(),
        "max": features.max_activations.double(),
        "effect": opened_run.atlas.effects.scores.double(),
    }
    for name, key in keys.items():
        page.select_option("#sort", name)
        values = [float(key[latent]) for latent in opened_page.rows()]
        assert len(values) >= 5
        assert values == sorted(values, reverse=True), name
        assert values[0] == float(key.max())
    page.select_option("#sort", "id")
    assert opened_page.rows()[:3] == [0, 1, 2]
    page.click("#direction")
    assert opened_page.rows()[:3] == [95, 94, 93]


def test_scores_of_evals_order_the_list_and_stand_on_cards(opened_page: Page, reported_run: Path):
    page, results = opened_page.page, read_results(reported_run / "results.json")
    scores = results.arrays["autointerp/latents/detection_auroc"]
    words = {e.latent: e for e in results.explanations["autointerp"]}
    option = page.locator("#sort option", has_text="autointerp: explanation: texts, AUROC")
    page.select_option("#sort", option.get_attribute("value"))
    shown = [float(scores[latent]) for latent in opened_page.rows()]
    assert shown == sorted(shown, reverse=True)
    assert shown[0] == float(scores[~scores.isnan()].max())
    best = opened_page.rows()[0]
    page.click("#direction")
    assert not any(scores[latent].isnan() for latent in opened_page.rows()[:3])
    page.click("#direction")
    page.click(f"#row-{best}")
    card = page.inner_text("#card")
    assert words[best].text in card
    assert "by rules" in card
    assert "explanation: texts, AUROC" in card


def test_each_eval_has_a_page_and_one_shows_at_a_time(opened_page: Page, reported_run: Path):
    page, results = opened_page.page, read_results(reported_run / "results.json")
    assert page.locator(".eval-tabs a").count() == len(results.evals)
    assert page.locator(".eval-page:visible").count() == 1
    for name in ("downstream", "interventions"):
        page.click(f"#tab-{name}")
        assert page.locator(".eval-page:visible").get_attribute("id") == f"eval-{name}"
        assert page.url.endswith(f"#eval-{name}")
        rows = page.locator(f"#eval-{name} tr:visible").count()
        n_metrics = sum("/" not in metric for metric in results.evals[name].metrics)
        assert rows in (n_metrics, n_metrics + 1), name  # with the head, where there is room
    text = page.inner_text("#eval-interventions")
    assert "Does a latent act as it reads?" in text
    assert "absorption" in text
    page.keyboard.press("ArrowUp")
    assert not page.url.endswith("#eval-interventions")
    page.goto(page.url.partition("#")[0] + "#eval-sparsity")
    assert page.locator(".eval-page:visible").get_attribute("id") == "eval-sparsity"


def test_an_evals_page_leads_to_the_latents_in_its_order(opened_page: Page, reported_run: Path):
    page, results = opened_page.page, read_results(reported_run / "results.json")
    scores = results.arrays["autointerp/latents/fuzzing_auroc"]
    page.click("#tab-autointerp")
    assert page.locator("#eval-autointerp .score svg").count() == 2
    page.locator("#eval-autointerp .score button").nth(1).click()
    shown = [float(scores[latent]) for latent in opened_page.rows()]
    assert shown == sorted(shown, reverse=True)
    assert shown[0] == float(scores[~scores.isnan()].max())


def test_search_by_id_and_by_text(opened_page: Page, opened_run: OpenedRun):
    page, atlas = opened_page.page, opened_run.atlas
    page.select_option("#scope", "id")
    page.fill("#search", "17")
    expect(page.locator("#count")).not_to_contain_text("96 latents")
    assert 17 in opened_page.rows()
    texts = ("".join(context.tokens) for context in atlas.contexts(17))
    word = max(re.findall("[a-z]{3,}", " ".join(texts)), key=len)
    page.fill("#search", word)
    expect(page.locator("#count")).to_have_text("0 of 96")
    page.select_option("#scope", "contexts")
    found = opened_page.rows()
    assert 17 in found
    for latent in found:
        texts = "".join("".join(context.tokens) for context in atlas.contexts(latent))
        assert word in texts.lower()
    best = re.findall("[a-z]+", atlas.promoted(17)[0][0].lower())
    page.fill("#search", best[0] if best else atlas.promoted(17)[0][0])
    page.select_option("#scope", "promoted")
    expect(page.locator("#row-17")).to_be_attached()
    page.fill("#search", "no such text anywhere")
    page.wait_for_selector("#rows .empty")


def test_a_latent_opens_with_all_that_is_known(opened_page: Page, opened_run: OpenedRun):
    page, atlas = opened_page.page, opened_run.atlas
    page.select_option("#sort", "max")
    latent = opened_page.rows()[0]
    page.click(f"#row-{latent}")
    expect(page.locator("#card h3").first).to_contain_text(str(latent))
    card = page.inner_text("#card")
    for words in ("Strongest contexts", "Activations", "Tokens promoted", "Tokens suppressed"):
        assert words.lower() in card.lower()
    assert atlas.promoted(latent)[0][0].strip() in card
    assert f"latent={latent}" in page.url
    assert page.locator("#card mark").count() >= 1


def test_a_link_to_a_latent_opens_it(browser, reported_run: Path):
    page = browser.new_page()
    page.goto((reported_run / "report.html").as_uri() + "#latent=42")
    expect(page.locator("#card h3").first).to_contain_text("42")
    page.close()
