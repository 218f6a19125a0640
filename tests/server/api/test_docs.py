"""The API's description at `/docs`: shown without the internet, under a strict policy."""

import gzip
import re
from hashlib import sha256
from pathlib import Path

import bitwatt.api.page
import pytest
from playwright.async_api import expect

from tests.fakes import make_app, make_client, run_server
from tests.server.api.browser import open_page

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.usefixtures("one_browser")]

VENDOR = Path(bitwatt.api.page.__file__).parent / "vendor"


@pytest.mark.needs_program("chromium")
async def test_a_request_is_tried_on_the_page_with_the_key_of_the_tab():
    app = make_app(api_key="sk-tab")
    async with (
        run_server(app, api_key="sk-tab") as url,
        open_page(f"{url}/docs") as (page, watched),
    ):
        field = page.get_by_label("This server asks for a key")
        await expect(field).to_be_focused()
        await field.fill("sk-tab")
        await field.press("Enter")
        await expect(field).to_be_hidden()
        chat = page.locator("#operations-default-create_chat_completion_v1_chat_completions_post")
        await chat.locator(".opblock-summary").click()
        await chat.get_by_role("button", name="Try it out").click()
        await chat.get_by_role("button", name="Execute").click()
        answer = chat.locator(".live-responses-table")
        await expect(answer).to_contain_text("the quick brown fox")
        await expect(answer.locator(".response .response-col_status")).to_contain_text("200")
        await expect(chat).to_contain_text("temperature: 3 is more than 2")  # the example of a 400
    assert all("401" in complaint for complaint in watched.complaints)
    elsewhere = [w for w in watched.urls if not w.startswith((url, "data:"))]
    assert elsewhere == []


async def test_the_page_and_all_it_needs_come_from_here_without_a_key():
    async with make_client(make_app(api_key="k")) as client:
        page = await client.get("/docs")
        wanted = re.findall(r'(?:src|href)="(/page[^"]*)"', page.text)
        assert "/page/vendor/swagger-ui-bundle.js" in wanted
        for path in ("/docs", *wanted):
            response = await client.get(path)
            assert response.status_code == 200, path
            policy = response.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "script-src 'self';" in policy
            assert "connect-src 'self';" in policy
        assert "<script>" not in page.text
        assert not re.search(r'\sstyle="|\son\w+="|https?://', page.text)


@pytest.mark.parametrize("name", ["swagger-ui-bundle.js", "swagger-ui.css"])
async def test_what_is_vendored_is_the_packages_file_sent_compressed_where_that_is_taken(name):
    whole = gzip.decompress((VENDOR / f"{name}.gz").read_bytes())
    assert f"{sha256(whole).hexdigest()}  {name}" in (VENDOR / "README.md").read_text()
    async with make_client(make_app()) as client:
        path = f"/page/vendor/{name}"
        plain = await client.get(path, headers={"accept-encoding": "identity"})
        zipped = await client.get(path, headers={"accept-encoding": "br, gzip"})
        head = await client.head(path, headers={"accept-encoding": "gzip"})
        known = {"if-none-match": zipped.headers["etag"], "accept-encoding": "gzip"}
        again = await client.get(path, headers=known)
    assert plain.content == zipped.content == whole
    assert "content-encoding" not in plain.headers
    assert zipped.headers["content-encoding"] == "gzip"
    assert zipped.headers["vary"] == plain.headers["vary"] == "Accept-Encoding"
    assert int(zipped.headers["content-length"]) < len(whole) / 3
    assert head.headers["content-length"] == zipped.headers["content-length"]
    assert (again.status_code, again.content) == (304, b"")
