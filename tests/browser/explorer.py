"""The explorer in a real browser: a server on a free local port, and Debian's Chromium to look at it.

    with serve() as url, chromium() as browser:
        page = browser.new_page()
        page.goto(url)
        settled(page)
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"verdict": "", "lens": "lens", "dynamics": "dynamics", "attention": "attention", "probes": "probes",
         "denoise": "denoise", "training": "training"}
"""Every page, and its path under the explorer's address."""

QUIET = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-domain-reliability", "--disable-client-side-phishing-detection", "--no-first-run",
         "--no-default-browser-check", "--disable-default-apps", "--disable-dev-shm-usage", "--mute-audio"]
"""No sandbox (CI runs as root) and nothing sent in the background."""

PATIENCE_S = 300.0
"""How long to wait for what is bound to come: a machine with one busy core answers late, and late is not wrong."""


@contextmanager
def serve(zoo: Path | None = None, results: Path | None = None, *, wait_s: float = PATIENCE_S) -> Iterator[str]:
    """Run the explorer on a free port of localhost; yields its address. RuntimeError with its log if it fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(os.environ)
    for name, folder in (("LOOPSCOPE_ZOO", zoo), ("LOOPSCOPE_RESULTS", results)):
        if folder is not None:
            environment[name] = str(folder)
    command = [sys.executable, "-m", "streamlit", "run", "app/main.py", "--server.port", str(port),
               "--server.headless", "true"]
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True)
    try:
        url = f"http://localhost:{port}"
        _await(f"{url}/_stcore/health", server, wait_s)
        yield url
    finally:
        server.terminate()
        try:
            server.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.communicate()


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, headless. RuntimeError with the remedy if it is not installed."""
    path = shutil.which("chromium")
    if path is None:
        raise RuntimeError("Chromium is not installed, and browser tests do not skip: `apt-get install chromium`.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=QUIET)
        try:
            yield browser
        finally:
            browser.close()


def settled(page: Page, *, timeout_s: float = PATIENCE_S) -> None:
    """Wait until the script has run, no element is stale, and every chart is drawn."""
    page.wait_for_selector("[data-testid=stAppViewContainer]", timeout=1000 * timeout_s)
    quiet_since, deadline = None, time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        busy = page.evaluate("""() => {
            const app = document.querySelector('[data-testid=stApp]');
            const running = app && app.getAttribute('data-test-script-state') !== 'notRunning';
            const stale = document.querySelectorAll('[data-stale=true], [data-testid=stSkeleton]').length;
            const charts = [...document.querySelectorAll('[data-testid=stPlotlyChart]')];
            const empty = charts.filter(c => !c.querySelector('.main-svg')).length;
            const text = document.querySelectorAll('[data-testid=stMain] h1, [data-testid=stMain] h3').length;
            return Boolean(running || stale || empty || !text);
        }""")
        quiet_since = None if busy else quiet_since or time.monotonic()
        if quiet_since and time.monotonic() - quiet_since > 0.4:
            return
        page.wait_for_timeout(50)
    raise TimeoutError(f"{page.url} was still busy after {timeout_s} s.")


def _await(url: str, server: subprocess.Popen[str], wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            log = server.stdout.read() if server.stdout else ""
            raise RuntimeError(f"the explorer ended with status {server.returncode} before it answered:\n{log}")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the explorer did not answer at {url} within {wait_s} s.")
