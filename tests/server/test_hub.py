"""Models by their names on a hub, which here is a local server that answers as the real one."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bitwatt import LLM, SamplingParams, builtin
from bitwatt.application import models_to_serve
from bitwatt.errors import HubError
from bitwatt.hub import HubModel, fetch, named
from huggingface_hub import constants

from tests.fake_hub import FakeHub, run_hub
from tests.fakes import make_settings

REPOSITORY = "org/model-1.58"
TEXTS = {
    "config.json": b"{}",
    "tokenizer.json": b"[]",
    "chat_template.jinja": b"x",
    "additional_chat_templates/tool_use.jinja": b"y",
}
OTHERS = {
    "README.md": b"#",
    "modeling.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"again",
    "original/params.json": b"{}",
    "tokenizer.model": b"no reader",
}
MODEL = {"model.safetensors": bytes(range(256)) * 512}
GGUFS = {"NAME-Q2_0.gguf": b"g128", "NAME-Q2_0_g64.gguf": b"g64", "NAME-PQ2_0.gguf": b"p"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with run_hub(FakeHub(repositories={REPOSITORY: {"main": TEXTS | OTHERS | MODEL}})) as running:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(tmp_path)
        yield running


def files_in(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def refusal(name: str) -> str:
    with pytest.raises(HubError) as error:
        fetch(name)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("org/name", HubModel("org/name")),
        ("org/name:x-Q2_0.gguf", HubModel("org/name", "x-Q2_0.gguf")),
        ("org/name@v1.0", HubModel("org/name", None, "v1.0")),
        ("org/name:a/b.gguf@refs/pr/1", HubModel("org/name", "a/b.gguf", "refs/pr/1")),
        ("./org/name", Path("org/name")),
        ("../name", Path("../name")),
        ("/org/name", Path("/org/name")),
        ("~/name", Path.home() / "name"),
        ("~nobody-here/name", Path("~nobody-here/name")),
        ("name", Path("name")),
        ("org/name/sub", Path("org/name/sub")),
        ("org/name:", Path("org/name:")),
        ("org/ name", Path("org/ name")),
        (Path("org/name"), Path("org/name")),
    ],
    ids=str,
)
def test_a_name_of_the_hub_is_told_from_a_path(text, meant):
    assert named(text) == meant


@pytest.mark.parametrize("kind", ["folder", "file", "link that leads nowhere"])
def test_what_is_here_goes_before_the_hub(hub, tmp_path, kind):
    path = tmp_path / "org" / "model-1.58"
    path.parent.mkdir()
    match kind:
        case "folder":
            path.mkdir()
        case "file":
            path.touch()
        case _:
            path.symlink_to("nowhere")
    assert fetch(REPOSITORY) == Path(REPOSITORY)
    assert not hub.requests


def test_only_what_is_read_is_downloaded(hub):
    folder = fetch(REPOSITORY)
    assert files_in(folder) == TEXTS | MODEL
    assert (folder / "model.safetensors").is_symlink()
    assert set(hub.names_of()) == set(TEXTS)  # the weights come from where that leads
    assert len([path for _, path, _ in hub.requests if path.startswith("/cdn/")]) == 1


def test_what_the_cache_has_is_not_downloaded_again(hub):
    folder = fetch(REPOSITORY)
    hub.requests.clear()
    assert fetch(REPOSITORY) == folder
    assert [method for method, path, _ in hub.requests if "/api/" not in path] == ["HEAD"]
    hub.repositories[REPOSITORY] = {"main": TEXTS | MODEL | {"config.json": b'{"new": 1}'}}
    newer = fetch(REPOSITORY)
    assert newer != folder
    assert (newer / "config.json").read_bytes() == b'{"new": 1}'


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, monkeypatch, capfd):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    hub.breaks["model.safetensors"] = [100_000]
    folder = fetch(REPOSITORY)
    assert (folder / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    ranges = [asked for _, path, asked in hub.requests if path.startswith("/cdn/")]
    assert ranges == ["", "bytes=100000-"]
    assert "%|" not in capfd.readouterr().err  # the bar is for terminals


def test_a_revision_is_a_branch_or_a_commit_and_a_commit_is_asked_for_once(hub):
    old = TEXTS | MODEL | {"config.json": b'{"old": 1}'}
    hub.repositories[REPOSITORY]["v1"] = old
    branch = fetch(f"{REPOSITORY}@v1")
    assert (branch / "config.json").read_bytes() == b'{"old": 1}'
    assert branch.name == hub.commit(old)
    hub.requests.clear()
    assert fetch(f"{REPOSITORY}@{hub.commit(old)}") == branch
    assert not hub.requests


def test_a_gguf_file_is_named_and_comes_alone(hub):
    hub.repositories[REPOSITORY]["main"] = TEXTS | GGUFS
    path = fetch(f"{REPOSITORY}:NAME-Q2_0_g64.gguf")
    assert path.name == "NAME-Q2_0_g64.gguf"
    assert path.read_bytes() == b"g64"
    assert files_in(path.parent) == {"NAME-Q2_0_g64.gguf": b"g64"}
    assert fetch(f"{REPOSITORY}:q2_0").read_bytes() == b"g128"  # as llama.cpp names it


def test_of_several_gguf_files_none_is_guessed(hub):
    hub.repositories[REPOSITORY]["main"] = TEXTS | GGUFS | {"mmproj-F16.gguf": b""}
    told = refusal(REPOSITORY)
    assert "has 3 GGUF files; name one as org/model-1.58:FILE: " in told
    assert all(name in told for name in GGUFS)
    assert not hub.names_of()


def test_the_only_gguf_needs_no_name_and_comes_with_all_its_parts(hub):
    parts = {f"q/m-0000{n}-of-00003.gguf": b"%d" % n for n in (1, 2, 3)}
    hub.repositories[REPOSITORY]["main"] = parts
    path = fetch(REPOSITORY)
    assert path.name == "m-00001-of-00003.gguf"
    assert files_in(path.parent.parent) == parts
    assert fetch(f"{REPOSITORY}:q/m-00002-of-00003.gguf") == path
    hub.repositories[REPOSITORY]["main"] = dict.fromkeys(list(parts)[:2], b"")
    assert "lacks q/m-00003-of-00003.gguf" in refusal(REPOSITORY)


def test_split_safetensors_come_with_their_index(hub):
    weights = {f"model-0000{n}-of-00002.safetensors": b"%d" % n for n in (1, 2)}
    weights["model.safetensors.index.json"] = b"{}"
    hub.repositories[REPOSITORY]["main"] = TEXTS | OTHERS | weights
    assert files_in(fetch(REPOSITORY)) == TEXTS | weights


def test_a_repository_of_other_weights_is_refused_before_a_download(hub):
    hub.repositories[REPOSITORY]["main"] = TEXTS | OTHERS
    assert "has neither model.safetensors, or its parts, nor a GGUF" in refusal(REPOSITORY)
    assert not hub.names_of()


def test_each_refusal_names_the_address_and_what_to_do(hub, monkeypatch):
    url = f"{hub.url}/{REPOSITORY}"
    assert f"{url} has no revision 'v9' (404; @REVISION)" in refusal(f"{REPOSITORY}@v9")
    assert f"{url} has no GGUF file 'x.gguf'; none of 11 is GGUF" in refusal(f"{REPOSITORY}:x.gguf")
    assert "no path here, and" in refusal("org/nothing")
    hub.token = "right"
    assert "(401): check the name; a private one wants a token (HF_TOKEN)" in refusal(REPOSITORY)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert f"{url} refuses the token (401): give another (HF_TOKEN)" in refusal(REPOSITORY)
    monkeypatch.setenv("HF_TOKEN", "right")
    assert f"{hub.url}/org/nothing is no model" in refusal("org/nothing")
    hub.gated.add(REPOSITORY)
    assert f"{url} is gated (403): accept its terms there" in refusal(REPOSITORY)
    assert "org--name/x' is no name of the hub's" in refusal("org--name/x")
    hub.status = 418
    assert f"{url} answers 418" in refusal(REPOSITORY)


def test_without_a_network_the_cache_serves_and_else_a_sentence_says_what_to_do(
    hub, monkeypatch, caplog
):
    folder = fetch(REPOSITORY)
    hub.status = 503
    assert fetch(REPOSITORY) == folder
    assert f"{hub.url}/{REPOSITORY} answers 503; served is the cache's commit" in caplog.text
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetch(REPOSITORY) == folder
    assert "http://127.0.0.1:9/org/model-1.58 can't be reached: " in caplog.text
    told = refusal("org/other@v1")
    assert told.startswith("http://127.0.0.1:9/org/other can't be reached: ")
    assert "lacks org/other@v1. " in told
    assert "`hf download org/other --revision v1` fills a cache (HF_HOME)" in told
    assert "HF_ENDPOINT" in told


def test_a_cache_that_lost_a_file_is_not_served(hub):
    (fetch(REPOSITORY) / "model.safetensors").resolve().unlink()
    hub.status = 503
    assert "has neither model.safetensors" in refusal(REPOSITORY)


def test_a_full_disk_is_told_before_the_download_and_within_it(hub, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "takes 0.000 GB more" in refusal(REPOSITORY)
    assert not hub.names_of()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    def fill(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fill)
    told = refusal(REPOSITORY)
    assert "make room there, or name another (HF_HOME)" in told


def test_a_cache_that_cant_be_written_is_told(hub, tmp_path):
    (tmp_path / "hub").touch()
    assert f"can't be kept in {tmp_path / 'hub'}: Not a directory (HF_HOME)" in refusal(REPOSITORY)


def test_a_model_is_loaded_through_the_links_of_the_cache(hub):
    hub.repositories[REPOSITORY]["main"] = files_in(builtin.TERNARY)
    with LLM(REPOSITORY, max_num_seqs=1, kv_cache_bytes=2**26) as llm:
        assert llm.generate("a", SamplingParams(max_tokens=2))[0].text


def test_a_served_model_has_its_name_on_the_hub(hub):
    ternary, dense = models_to_serve(make_settings(path=REPOSITORY, compare=True))
    assert (ternary.name, dense.name) == (REPOSITORY, f"{REPOSITORY}-fp16")
    assert files_in(ternary.path) == TEXTS | MODEL
    hub.repositories[REPOSITORY]["main"] = GGUFS
    [only] = models_to_serve(make_settings(path=f"{REPOSITORY}:Q2_0", served_model_name="x"))
    assert (only.name, only.path.name) == ("x", "NAME-Q2_0.gguf")


def test_the_hubs_variables_are_honoured(hub, tmp_path):
    """In a process of its own, for the library reads them as it is imported."""
    hub.token = "right"
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "right",
    }
    script = "import sys; from bitwatt.hub import fetch; print(fetch(sys.argv[1]))"

    def run(**changes: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-c", script, REPOSITORY],
            env=environment | changes,
            capture_output=True,
            text=True,
            check=False,
        )

    first = run()
    folder = Path(first.stdout.strip())
    assert folder.is_relative_to(tmp_path / "home" / "hub"), first.stderr
    assert files_in(folder) == TEXTS | MODEL
    hub.requests.clear()
    assert run(HF_HUB_OFFLINE="1").stdout == first.stdout
    assert not hub.requests
    assert "HF_HUB_OFFLINE is set, and the cache" in run(HF_HUB_OFFLINE="1", HF_HOME="/n").stderr
