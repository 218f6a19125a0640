"""A headless browser at the page, and screenshots of it.

python -m tests.server.api.browser http://127.0.0.1:8000 docs/screenshots
python -m tests.server.api.browser http://127.0.0.1:8001 docs/screenshots single
"""

import asyncio
import re
import shutil
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from axe_playwright_python.async_playwright import Axe
from playwright.async_api import async_playwright, expect

# The shell draws the same pages for two thirds of the CPU time, where it is installed.
CHROMIUM = shutil.which("chromium-headless-shell") or "/usr/bin/chromium"
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


# What a page shows, it shows within this on a machine that is busy with other tests too.
expect.set_options(timeout=60_000)


class Watched:
    """What a page asked for and complained of."""

    def __init__(self, page):
        self.complaints = []
        self.urls = []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.urls.append(request.url))

    def _on_console(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)


class PageClock:
    """What a page times its streams by: stands still but while something sleeps by it."""

    SCRIPT = """
        let now = 0;
        performance.now = () => now;
        performance.moveOn = (ms) => { now += ms; };
    """

    def __init__(self):
        self._page = None

    async def take_over(self, page):
        """Before the page is opened."""
        await page.add_init_script(self.SCRIPT)
        self._page = page

    async def sleep(self, seconds):
        await self._page.evaluate("(ms) => performance.moveOn(ms)", seconds * 1000)


class Chromium:
    """A headless browser, started for the first page and kept for those after it."""

    def __init__(self):
        self._ends = AsyncExitStack()
        self._browser = None

    async def new_context(self, **options):
        """Return what a page lives in: cookies, storage and cache of its own."""
        if self._browser is None or not self._browser.is_connected():
            playwright = await self._ends.enter_async_context(async_playwright())
            self._browser = await playwright.chromium.launch(
                executable_path=CHROMIUM, args=CHROMIUM_FLAGS
            )
            self._ends.push_async_callback(self._browser.close)
        return await self._browser.new_context(**options)

    async def close(self):
        await self._ends.aclose()


_kept = None


@asynccontextmanager
async def kept_browser():
    """Have the pages that the block opens share a browser."""
    global _kept
    _kept = Chromium()
    try:
        yield
    finally:
        closing, _kept = _kept, None
        await closing.close()


@asynccontextmanager
async def open_page(url, *, clock=None, **options):
    """Open the page at this address, by this PageClock if one is given.

    The page's browser is the kept one, or its own.
    """
    async with AsyncExitStack() as ends:
        if (chromium := _kept) is None:
            chromium = Chromium()
            ends.push_async_callback(chromium.close)
        context = await chromium.new_context(**options)
        ends.push_async_callback(context.close)
        page = await context.new_page()
        watched = Watched(page)
        if clock:
            await clock.take_over(page)
        await page.goto(url)
        yield page, watched


async def barriers(page):
    """Return what axe-core finds that bars people from the page, a line each."""
    # What passes need not be told, for half of the time.
    wanted = {"resultTypes": ["violations"]}
    found = (await Axe().run(page, options=wanted)).response["violations"]
    return [f"{rule['id']}: {node['html']}" for rule in found for node in rule["nodes"]]


async def barriers_in_every_look(page):
    """Return the barriers by look: in light, in dark, and on a phone."""
    found = {}
    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme)
        found[scheme] = await barriers(page)
    wide = page.viewport_size
    await page.emulate_media(color_scheme="light")
    await page.set_viewport_size({"width": 390, "height": 844})
    found["phone"] = await barriers(page)
    await page.set_viewport_size(wide)
    return found


async def run_load(page, *, windows=2, requests=4, tokens=12, timeout_s=20):
    await page.get_by_label(re.compile("^Windows")).fill(str(windows))
    await page.get_by_label("Requests a window").fill(str(requests))
    await page.get_by_label("Tokens an answer").fill(str(tokens))
    button = page.get_by_role("button", name="Run load")
    await button.focus()
    await button.press("Enter")
    await expect(button).to_be_focused()
    status = page.locator("#load-status")
    await expect(status).to_have_text(re.compile("^(Done:|Failed)"), timeout=timeout_s * 1000)
    await expect(button).to_be_focused()


async def ask(page, *, timeout_s=60):
    """Ask, and return once each model's answer has ended, whatever its figures."""
    await expect(page.locator("#answers article").first).to_be_visible()
    button = page.get_by_role("button", name="Ask")
    await button.click()
    await expect(button).to_have_attribute("aria-disabled", "false", timeout=timeout_s * 1000)
    ended = re.compile("^(complete|at the token limit)$")
    states = page.locator("#answers .state")
    await expect(states).to_have_text([ended] * await states.count())
    # Answers that aren't drawn are timed after those that are.
    await expect(button).to_have_attribute("aria-disabled", "false", timeout=timeout_s * 1000)


async def take_screenshots(url, folder):
    """Ask, measure, and save the page in light, in dark and as wide as a phone."""
    folder.mkdir(parents=True, exist_ok=True)
    async with open_page(url, viewport={"width": 1280, "height": 900}) as (page, _):
        await ask(page)
        await run_load(page, windows=5, requests=128, tokens=64, timeout_s=300)
        await page.wait_for_timeout(1500)
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            await page.wait_for_timeout(500)
            await page.screenshot(path=folder / f"page-{scheme}.png", full_page=True)
        await page.emulate_media(color_scheme="light")
        await page.set_viewport_size({"width": 390, "height": 844})
        await page.wait_for_timeout(500)
        await page.screenshot(path=folder / "page-phone.png", full_page=True)


async def take_screenshot_of_one(url, folder, name):
    """Ask the only model of a server, and save its page in light."""
    async with open_page(url, viewport={"width": 1280, "height": 900}) as (page, _):
        await ask(page)
        badge = page.locator("#tile-speed .badge")
        await expect(badge).to_have_text("quick look", timeout=30_000)
        await page.wait_for_timeout(1500)
        await page.screenshot(path=folder / f"page-{name}.png", full_page=True)


if __name__ == "__main__":
    url, folder = sys.argv[1], Path(sys.argv[2])
    if len(sys.argv) > 3:
        asyncio.run(take_screenshot_of_one(url, folder, sys.argv[3]))
    else:
        asyncio.run(take_screenshots(url, folder))
