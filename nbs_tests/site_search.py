"""Searches the built site as a reader does who opened its pages as files, with no network: `python -m nbs_tests.site_search SITE`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

FOUND = {"overfitting": "What went wrong", "Ollama": "Use the result elsewhere", "valid_fraction": "Bring your data"}
"""What is searched for -> the title of a page that is found."""


def main(site: Path) -> int:
    """Searches from a page at the top and from one in a folder."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for start in ("index.html", "howto/resume.html"):
            for words, title in FOUND.items():
                page, asked = browser.new_page(), []
                page.on("request", lambda request, asked=asked: asked.append(request.url))
                page.goto((site.resolve() / start).as_uri())
                page.locator("input.md-search__input").fill(words)
                expect(page.locator(".md-search-result__item h1").filter(has_text=title).first).to_be_attached(timeout=20_000)
                elsewhere = [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
                assert asked and not elsewhere, elsewhere
                page.close()
        browser.close()
    print(f"found {', '.join(FOUND)} from files, with no request elsewhere")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
