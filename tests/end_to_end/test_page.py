"""The page over real engines: from an idle start to what ternary weights save, without a click."""

import asyncio
import re
from collections.abc import Iterator

import httpx
import pytest
from bitwatt import builtin
from bitwatt_client.exposition import parse_samples
from playwright.async_api import expect

from tests.end_to_end.conftest import Server, start_server, stop_server
from tests.server.api.browser import barriers, open_page

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.needs_program("chromium"),
    pytest.mark.usefixtures("one_browser"),
]

GAIN = re.compile(r"^[\d.,]+×$")
SUMMARY = re.compile(r"^Ternary weights: \d+% less memory for weights .*(speed|second).*quality")
DIFFERENCE = re.compile(r"^([\d.]+% (worse|better)|no difference)$")


@pytest.fixture
def two_servers() -> Iterator[tuple[Server, Server]]:
    """The ternary server, which reads the other as its twin, and the other: two processes."""
    name = ("--served-model-name", "pair-fp16", "--weights", "dense")
    twin = start_server(str(builtin.TERNARY), *name)
    name = ("--served-model-name", "pair", "--weights", "ternary")
    ternary = start_server(str(builtin.TERNARY), *name, "--twin-url", twin.url)
    yield ternary, twin
    for server in (ternary, twin):
        assert stop_server(server) == 0


async def expect_figures(url: str) -> None:
    async with open_page(url) as (page, watched):
        for tile, figure in (("memory", GAIN), ("speed", GAIN), ("quality", DIFFERENCE)):
            gain = page.locator(f"#tile-{tile} .gain").first
            await expect(gain).to_have_text(figure, timeout=15_000)
        await expect(page.locator("#summary")).to_have_text(SUMMARY)
        table = page.get_by_role("region", name="Results of the load")
        row = table.get_by_role("row", name="Decode speed, share of own roofline")
        # Of the ternary model and of its twin: memory's rate was measured by both engines, in
        # idle seconds, of which engines beside other tests have few.
        shares = re.compile(r"%.*%.*each has its own")
        await expect(row).to_contain_text(shares, timeout=90_000)
        assert await barriers(page) == []
    assert watched.complaints == []


async def test_an_idle_server_shows_what_ternary_saves_without_a_click(server: Server) -> None:
    await expect_figures(server.url)


async def test_two_servers_show_it_as_one_does(two_servers: tuple[Server, Server]) -> None:
    ternary, twin = two_servers
    await expect_figures(ternary.url)
    body = {"model": "pair", "prompt": "import ", "max_tokens": 8, "temperature": 0}
    mirrored = {"X-Bitwatt-Shadow": "1"}
    async with httpx.AsyncClient(timeout=60) as client:
        answer = await client.post(f"{ternary.url}/v1/completions", json=body, headers=mirrored)
        assert answer.is_success
        state = (await client.get(f"{ternary.url}/bitwatt/v1/comparison")).json()
        assert [model["name"] for model in state["models"]] == ["pair", "pair-fp16"]
        alone = (await client.get(f"{twin.url}/bitwatt/v1/comparison")).json()
        assert [model["name"] for model in alone["models"]] == ["pair-fp16"]
        compared = {"outcome": "compared", "mirror_name": "pair-fp16"}
        for _ in range(300):
            if await counted(client, ternary.url, **compared):
                break
            await asyncio.sleep(0.1)
        assert await counted(client, ternary.url, **compared) == 1


async def counted(client: httpx.AsyncClient, url: str, **labels: str) -> float:
    exposition = parse_samples((await client.get(f"{url}/metrics")).text)
    return exposition.total("bitwatt_shadow_requests_total", **labels) or 0
