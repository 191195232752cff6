"""Screenshots of every page, for people to look at.

    python tests/browser/screenshots.py --out /tmp/shots                # the bundled zoo and results
    python tests/browser/screenshots.py --pages lens probes --query "loops=16&masking=by+hand"
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.browser.explorer import PAGES, chromium, serve, settled


@dataclass(frozen=True)
class Screenshots:
    """Photograph the explorer."""

    out: Path = Path("screenshots")
    """Folder for the pictures, one PNG per page."""
    pages: tuple[str, ...] = tuple(PAGES)
    """Which pages."""
    query: str = ""
    """Query string that sets the controls, as the address bar shows it."""
    width: int = 1440
    """Width of the window in pixels."""
    height: int = 900
    """Height of the window; pages are photographed whole unless `--window` is given."""
    window: bool = False
    """Only what the window shows, as a visitor first sees it."""
    zoo: Path | None = None
    """Another zoo than the bundled one."""
    results: Path | None = None
    """Another results folder than the bundled one."""


def main(args: Screenshots) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    with serve(args.zoo, args.results) as url, chromium() as browser:
        page = browser.new_page(viewport={"width": args.width, "height": args.height})
        for name in args.pages:
            page.set_viewport_size({"width": args.width, "height": args.height})
            page.goto(f"{url}/{PAGES[name]}?{args.query}")
            settled(page)
            if not args.window:  # the page scrolls inside a container: make the window as tall as its content
                tall = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
                page.set_viewport_size({"width": args.width, "height": max(args.height, tall + 20)})
                settled(page)
            page.screenshot(path=args.out / f"{name}.png")
            print(args.out / f"{name}.png")


if __name__ == "__main__":
    main(tyro.cli(Screenshots))
