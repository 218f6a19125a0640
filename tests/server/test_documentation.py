"""docs/api.md and docs/settings.md say what the code does."""

import re

import pytest
from bitwatt.api.schemas.chat import Message
from bitwatt.api.schemas.common import StreamOptions
from bitwatt.checkpoints.gguf_config import ARCHITECTURES
from bitwatt.documentation import DOCS, PAGES, rendered
from bitwatt.model.families import FAMILIES
from bitwatt.settings import ServeSettings

from tests.bodies import BODY_TYPES
from tests.fakes import make_app

API = (DOCS / "api.md").read_text()
PARAMETERS = (DOCS / "parameters.md").read_text()
SETTINGS = (DOCS / "settings.md").read_text()
MODELS = (DOCS / "models.md").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_a_pages_tables_are_those_of_the_code(page):
    text = (DOCS / page).read_text()
    assert "<!-- table:" in text
    assert text == rendered(text), "run python -m bitwatt.documentation"


def test_prose_around_a_table_is_kept():
    text = "before\n<!-- table: tune -->\nstale\n<!-- end of table -->\nafter\n"
    written = rendered(text)
    assert written.startswith("before\n<!-- table: tune -->\n\n| Flag |")
    assert written.endswith("|\n\n<!-- end of table -->\nafter\n")
    assert "stale" not in written
    assert rendered(written) == written


def test_every_route_is_on_the_page():
    paths = make_app().openapi()["paths"]
    assert "/v1/chat/completions" in paths
    for path in paths:
        assert re.search(rf"`(GET|POST) {re.escape(path)}`", API), (
            f"add {path} to the routes in docs/api.md"
        )


def test_every_family_is_on_the_page_by_each_of_its_names():
    names = re.findall(r"`([^`]+)`", MODELS.partition("\n## Twins")[0])
    assert FAMILIES.keys() <= {*names}, "add it to the families of docs/models.md"
    [row] = re.findall(r"^\| `general.architecture` \|(.*)", MODELS, re.MULTILINE)
    named = re.findall("`([^`]+)`", row)
    assert sorted(named) == sorted(ARCHITECTURES), "general.architecture of docs/models.md"


@pytest.mark.parametrize("body", [*BODY_TYPES.values(), Message, StreamOptions])
def test_every_field_says_what_it_means_and_is_on_the_page(body):
    for name, schema in body.model_json_schema()["properties"].items():
        assert schema.get("description"), name
        assert f"| `{name}` |" in API
    for name in body.parameters:
        assert f"| `{name}` |" in PARAMETERS


def test_the_limits_shown_are_those_that_hold():
    assert "| `temperature` | number | 0 to 2 | `1.0` |" in API
    assert "| `top_p` | number | 0 to 1 | `1.0` |" in API
    assert "| `n` | integer | 1 to 128 | `1` |" in API
    assert "| `priority` | integer | -(2^31 - 1) to 2^31 - 1 | `0` |" in API


def test_every_setting_is_on_the_page_with_flag_and_variable():
    for name in ServeSettings.model_fields.keys() - {"path"}:
        assert re.search(rf"\| `--{name.replace('_', '-')}[ `]", SETTINGS)
        assert f"| `BITWATT_{name.upper()}` |" in SETTINGS
