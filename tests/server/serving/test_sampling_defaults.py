"""What a model's files recommend stands where a request is silent, unless the operator says no."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from bitwatt import LLM, SamplingParams, builtin
from bitwatt.api.app import create_app
from bitwatt.errors import CheckpointError
from bitwatt.inspection import inspect
from bitwatt.serving.sampling_params import checked_defaults
from bitwatt.telemetry.metrics import Metrics
from bitwatt.text.codec import TextCodec

from tests.fakes import FakeEngine, make_client, make_model, make_settings

pytestmark = pytest.mark.anyio

DEFAULTS = {
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "fox"}]}
ROUTES = [
    ("/v1/completions", {"model": "tiny", "prompt": "fox"}),
    ("/v1/chat/completions", CHAT),
    ("/v1/responses", {"model": "tiny", "input": "fox"}),
    ("/v1/messages", CHAT | {"max_tokens": 8}),
]


async def drawn_by(path: str, body: dict[str, Any], defaults: dict[str, float]) -> Any:
    """Return the sampling that an engine was sent, and the answer."""
    engine, metrics = FakeEngine(), Metrics()
    model = make_model(engine, metrics=metrics, sampling_defaults=defaults)
    async with make_client(create_app({"tiny": model}, make_settings(), metrics)) as client:
        answer = (await client.post(path, json=body)).raise_for_status().json()
    [submit] = engine.submitted
    return submit.sampling, answer


@pytest.mark.parametrize(("path", "body"), ROUTES, ids=[path for path, _ in ROUTES])
async def test_a_silent_request_is_drawn_by_the_models_defaults(path, body):
    sampling, _ = await drawn_by(path, body, DEFAULTS)
    assert {name: getattr(sampling, name) for name in DEFAULTS} == DEFAULTS
    sampling, _ = await drawn_by(path, body, {})
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.0, 1.0)


@pytest.mark.parametrize(("path", "body"), ROUTES, ids=[path for path, _ in ROUTES])
async def test_what_a_request_says_goes_before_them_at_any_value(path, body):
    sampling, _ = await drawn_by(path, body | {"temperature": 1.0, "top_k": None}, DEFAULTS)
    assert (sampling.temperature, sampling.top_k) == (1.0, 20)
    sampling, _ = await drawn_by(path, body | {"temperature": 0}, DEFAULTS)
    assert sampling.temperature == 0.0


async def test_a_response_tells_by_what_it_was_drawn():
    _, answer = await drawn_by("/v1/responses", {"model": "tiny", "input": "fox"}, DEFAULTS)
    assert (answer["temperature"], answer["top_p"]) == (0.6, 0.95)


async def test_the_list_of_models_has_them():
    metrics = Metrics()
    model = make_model(FakeEngine(), metrics=metrics, sampling_defaults=DEFAULTS)
    async with make_client(create_app({"tiny": model}, make_settings(), metrics)) as client:
        [card] = (await client.get("/v1/models")).json()["data"]
    assert card["default_sampling_params"] == DEFAULTS


def folder_with(tmp_path: Path, **generation: Any) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(builtin.TERNARY, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | generation))
    return folder


def test_a_folders_generation_config_is_read_and_turned_off(tmp_path):
    folder = folder_with(tmp_path, do_sample=True, max_length=20, top_k=20.0, min_p=None)
    told = TextCodec.from_folder(folder).sampling_defaults
    assert checked_defaults(told, folder, "auto") == {"top_k": 20}
    assert checked_defaults(told, folder, "none") == {}
    assert inspect(folder)["sampling"] == {"top_k": 20}
    assert TextCodec.from_folder(builtin.TERNARY).sampling_defaults == {}
    assert TextCodec.from_folder(builtin.FP16).sampling_defaults == {}


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("temperature", "hot", "has temperature of 'hot'; a number is needed"),
        ("top_k", True, "has top_k of True; a number is needed"),
        ("temperature", 9, "temperature is 9; it must be from 0 to 2 (--generation-config none"),
        ("top_k", 1.5, "top_k is 1.5; it must be a whole number"),
        ("top_p", float("nan"), "top_p is nan; it must be from 0 to 1"),
    ],
)
def test_a_default_that_no_request_could_ask_for_ends_the_start(tmp_path, field, value, said):
    folder = folder_with(tmp_path, **{field: value})
    with pytest.raises(CheckpointError) as raised:
        LLM(folder)
    assert said in str(raised.value)
    assert inspect(folder)["refused"] == [str(raised.value)]


def test_prompts_in_python_are_drawn_by_them_where_no_parameters_are_given(tmp_path):
    folder = folder_with(tmp_path, temperature=0.0)
    greedy = SamplingParams(temperature=0)
    small = {"kv_cache_bytes": 2**26, "max_num_seqs": 4}
    with LLM(folder, **small) as llm:
        assert llm.get_default_sampling_params() == greedy
        assert llm.generate("def main(") == llm.generate("def main(", greedy)
    with LLM(folder, generation_config="none", **small) as llm:
        assert llm.get_default_sampling_params() == SamplingParams()
