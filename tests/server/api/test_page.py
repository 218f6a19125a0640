"""The page at `/`: driven in a headless browser, and its files over plain HTTP."""

import asyncio
import re
from dataclasses import dataclass, field, replace

import pytest
from bitwatt.api.app import create_app
from bitwatt.engine.messages import EngineStats, MemoryUse
from bitwatt.telemetry.metering import ModelEnergy
from bitwatt.telemetry.metrics import Metrics, ModelMetrics
from playwright.async_api import expect

from tests.fakes import (
    FakeEngine,
    make_app,
    make_client,
    make_info,
    make_model,
    make_settings,
    run_server,
)
from tests.server.api.browser import PageClock, open_page, run_load

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

REPLY = "the quick brown fox jumps over the lazy dog, and the dog sleeps on in the sun"
DENSE_MEMORY = MemoryUse(
    packed_weights_bytes=0,
    embedding_bytes=200,
    other_weights_bytes=1040,
    kv_cache_bytes=1000,
)


class MeteredEnergy(ModelEnergy):
    """So many joules a token, measured."""

    source = "rapl"
    busy_joules = 0.0

    def __init__(self, name, joules_per_token):
        super().__init__(name)
        self.unavailable = None
        self.joules_per_token = joules_per_token


@dataclass(kw_only=True)
class CountingEngine(FakeEngine):
    """Reports its figures as an engine does."""

    metrics: ModelMetrics
    energy: ModelEnergy
    stats: EngineStats = field(default_factory=EngineStats)

    async def submit(self, request):
        async for output in super().submit(request):
            is_last = output.finish_reason is not None
            self.stats = EngineStats(
                num_running=len(self.running) - is_last,
                num_blocks=64,
                num_blocks_used=8 * (len(self.running) - is_last),
                num_generation_tokens=self.stats.num_generation_tokens + len(output.token_ids),
                num_steps=self.stats.num_steps + 1,
            )
            self.metrics.on_stats(self.stats)
            if isinstance(self.energy, MeteredEnergy):
                self.energy.busy_joules += self.energy.joules_per_token * len(output.token_ids)
            yield output


def make_pair_app(
    *, reply=REPLY, delays_s=(0.02, 0.03), sleep=asyncio.sleep, joules=None, **settings
):
    """Return an application over `tiny` and its slower 16-bit twin.

    delays_s  before a token, of each, slept by `sleep`
    joules    a token, of each; None where nothing is measured
    """
    metrics = Metrics()
    infos = {
        "tiny": make_info(num_linear_parameters=1000, num_layers=2, attention_width=8),
        "tiny-fp16": make_info(
            weights="dense",
            memory=DENSE_MEMORY,
            num_linear_parameters=1000,
            num_layers=2,
            attention_width=8,
        ),
    }
    served = {}
    for index, (name, info) in enumerate(infos.items()):
        energy = ModelEnergy() if joules is None else MeteredEnergy(name, joules[index])
        engine = CountingEngine(
            reply=reply,
            delay_s=delays_s[index],
            sleep=sleep,
            info=info,
            metrics=metrics.model(name),
            energy=energy,
        )
        served[name] = replace(make_model(engine, name=name, metrics=metrics), energy=energy)
    return create_app(served, make_settings(**settings), metrics)


@pytest.mark.needs_program("chromium")
async def test_a_prompt_runs_on_both_models_and_a_load_fills_the_headline():
    clock = PageClock()
    app = make_pair_app(sleep=clock.sleep)
    async with run_server(app) as url, open_page(url, clock=clock) as (page, watched):
        memory, speed, energy, cost = (
            page.locator(f"#tile-{name}") for name in ("memory", "speed", "energy", "cost")
        )
        # 310 bytes of weights against 1240.
        await expect(memory).to_contain_text("4.00×")
        await expect(memory).to_contain_text("measured")
        await expect(speed).to_contain_text("not measured yet")

        await page.get_by_label("Prompt", exact=True).fill("what does the fox do?")
        await page.get_by_role("button", name="Ask both").click()
        for name in ("tiny", "tiny-fp16"):
            side = page.get_by_role("article", name=name, exact=True)
            await expect(side).to_contain_text("complete")
            await expect(side.get_by_role("region")).to_have_text(REPLY)
            await expect(side.locator("dd")).to_have_text(
                [re.compile(r"\d m?s"), re.compile(r"\d tok/s"), re.compile(r"^\d+$")]
            )
        await expect(speed).to_contain_text("n = 1 prompt")

        await run_load(page)
        table = page.get_by_role("region", name="Results of the load")
        await expect(table.get_by_role("row")).to_have_count(7)
        await expect(table).to_contain_text("2 alternating windows of 4 requests, 4 at once")
        await expect(speed).to_contain_text(re.compile(r"tok/s against .*n\s=\s2 windows"))
        await expect(energy).to_contain_text("unavailable")
        await expect(energy).to_contain_text("energy is not metered")
        await expect(energy).to_contain_text("estimated")
        await expect(energy.locator(".gain")).to_have_text("–")
        await expect(cost).to_contain_text("no rent is set (--usd-per-hour)")

        charts = page.locator("#charts [role=img]")
        await expect(charts).to_have_count(3)
        await expect(charts.locator("canvas")).to_have_count(3)
        label = re.compile(r"Tokens generated a second, line chart. Now: tiny \d")
        await expect(charts.first).to_have_attribute("aria-label", label)
        await expect(page.get_by_role("region", name="Memory by kind")).to_contain_text("1.04 kB")

    assert watched.complaints == []
    assert {wanted for wanted in watched.urls if not wanted.startswith(url)} == set()


@pytest.mark.needs_program("chromium")
async def test_a_loss_is_shown_as_a_loss_on_a_phone_too():
    clock = PageClock()
    app = make_pair_app(delays_s=(0.03, 0.002), sleep=clock.sleep, joules=(4, 1), usd_per_hour=2)
    phone = {"width": 390, "height": 844}
    async with (
        run_server(app) as url,
        open_page(url, clock=clock, viewport=phone) as (page, watched),
    ):
        await run_load(page)
        # A token every 30 ms against one every 2 ms.
        for name, gain, values, said in (
            ("speed", "0.0667×", "33.3 tok/s against 500 tok/s", "93.3% fewer tokens"),
            ("energy", "0.25×", "4 J against 1 J", "300% more energy"),
            ("cost", "0.0667×", "$16.67 against $1.11", "1,400% more expensive"),
        ):
            tile = page.locator(f"#tile-{name}")
            await expect(tile.locator(".gain.worse")).to_have_text(gain)
            await expect(tile.locator(".values")).to_have_text(values)
            await expect(tile.locator(".said")).to_have_text(said)
        widths = await page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1]
    assert watched.complaints == []


@pytest.mark.needs_program("chromium")
async def test_a_key_is_asked_for_and_kept_in_the_tab_alone():
    app = make_pair_app(api_key="sk-tab")
    async with run_server(app, api_key="sk-tab") as url, open_page(url) as (page, watched):
        field_ = page.get_by_label("API key")
        await expect(field_).to_be_focused()
        await field_.fill("wrong")
        await field_.press("Enter")
        await expect(field_).to_be_focused()
        await field_.fill("sk-tab")
        await field_.press("Enter")
        await expect(page.locator("#tile-memory")).to_contain_text("4.00×")
        await page.reload()
        await expect(page.locator("#tile-memory")).to_contain_text("4.00×")
        kept = await page.evaluate("[Object.values(sessionStorage), localStorage.length]")
        assert kept == [["sk-tab"], 0]
        assert not await page.context.cookies()
    assert all("401" in complaint for complaint in watched.complaints)
    assert not any("sk-tab" in wanted for wanted in watched.urls)


@pytest.mark.needs_program("chromium")
async def test_a_model_without_a_twin_can_be_asked_and_the_page_says_what_is_missing():
    engine = FakeEngine(reply=REPLY)
    async with run_server(make_app(engine)) as url, open_page(url) as (page, watched):
        await expect(page.get_by_role("alert")).to_contain_text("bitwatt serve --compare")
        await expect(page.locator("#tile-memory")).to_contain_text("needs two models")
        await expect(page.get_by_role("button", name="Run load")).to_be_hidden()
        await page.get_by_role("button", name="Ask both").click()
        await expect(page.get_by_role("region", name="Answer of tiny")).to_have_text(REPLY)
        memory = page.get_by_role("region", name="Memory by kind")
        await memory.focus()
        await page.wait_for_timeout(1500)
        await expect(memory).to_be_focused()
    assert watched.complaints == []


@pytest.mark.needs_program("chromium")
async def test_what_a_model_says_is_never_read_as_html():
    reply = "<img src=/x onerror=alert(1)><b>bold"
    async with run_server(make_pair_app(reply=reply)) as url, open_page(url) as (page, watched):
        await page.get_by_label("Prompt", exact=True).press("Control+Enter")
        region = page.get_by_role("region", name="Answer of tiny", exact=True)
        await expect(region).to_have_text(reply)
        assert await region.locator("*").count() == 0
    assert watched.complaints == []
    assert not any(wanted.endswith("/x") for wanted in watched.urls)


async def test_the_page_and_all_it_needs_come_with_a_strict_policy():
    async with make_client(make_app(api_key="k")) as client:
        page = await client.get("/")
        wanted = re.findall(r'(?:src|href)="(/[^"]*)"', page.text)
        assert "/page/main.js" in wanted
        for path in ("/", "/page/prompts.json", *wanted):
            response = await client.get(path)
            assert response.status_code == 200, path
            policy = response.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["x-frame-options"] == "DENY"
            assert response.headers["referrer-policy"] == "no-referrer"
        assert "<script>" not in page.text
        assert not re.search(r'\sstyle="|\son\w+="|https?://', page.text)


async def test_a_file_that_has_not_changed_is_not_sent_again():
    async with make_client(make_app()) as client:
        first = await client.get("/page/main.js")
        assert first.headers["content-type"] == "text/javascript; charset=utf-8"
        again = await client.get("/page/main.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path",
    ["/page/nothing.js", "/page/__init__.py", "/page/../app.py", "/page/%2e%2e/app.py", "/page/"],
)
async def test_nothing_but_the_pages_files_is_served(path):
    async with make_client(make_app()) as client:
        assert (await client.get(path)).status_code == 404


async def test_the_comparison_is_numbers_with_reasons_for_what_is_missing():
    async with make_client(make_pair_app(usd_per_hour=2)) as client:
        answer = (await client.get("/bitwatt/v1/comparison")).json()
        refused = await client.get("/bitwatt/v1/comparison?since=-1")
    tiny, twin = answer["models"]
    assert (tiny["name"], twin["name"]) == ("tiny", "tiny-fp16")
    assert tiny["engine"]["memory"]["packed_weights_bytes"] == 100
    assert tiny["energy"]["joules"] is None
    assert tiny["energy"]["reason"] == "energy is not metered"
    # 1000 additions of 0.007 pJ, and attention alike on both sides.
    saved = twin["energy"]["arithmetic_joules_per_token"]
    saved -= tiny["energy"]["arithmetic_joules_per_token"]
    assert saved == pytest.approx(1000 * (0.5e-12 - 0.007e-12))
    assert answer["prices"]["usd_per_hour"] == 2
    assert refused.status_code == 400
