"""The command line and its settings."""

import logging
import re
import socket
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import get_args

import pytest
from bitwatt import __version__, cli
from bitwatt.cli import COMMANDS, main, models_to_serve
from bitwatt.commands import CompareSettings
from bitwatt.engine.messages import EngineConfig
from bitwatt.knobs import knobs_of
from bitwatt.settings import Backend, ServeSettings
from bitwatt_kernels.registry import BACKENDS

from tests.fakes import make_settings


def run(capsys, *args):
    """Return the exit status, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as exit_:
        main(args)
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


def test_the_version_is_printed(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"bitwatt {__version__}\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--port", "99999"], "--port '99999': Input should be less than or equal to 65535"),
        (["--max-model-len", "x"], "--max-model-len 'x'"),
        (["/no/such/folder"], "PATH '/no/such/folder': is not a folder"),
        (["microsoft/bitnet"], "of Hugging Face's hub is downloaded first, with `hf download`"),
        (["--weights", "fp16"], "need a PATH"),
        (
            ["--weights", "ternay"],
            "--weights 'ternay': is one of ternary, dense, fp16 (BITWATT_",
        ),
        (["--api-key", "sha256:xyz"], "--api-key: sha256: is followed by"),
        (["--api-key", ""], "--api-key: a key is empty"),
        (["--api-key", " , "], "--api-key: a key is empty"),
        (["--api-key", f"k,sha256:{sha256().hexdigest()}"], "--api-key: a key is empty"),
        (["--gpu-memory-utilization", "1.5"], "BITWATT_GPU_MEMORY_UTILIZATION"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_limit(capsys, args, said):
    status, _, error = run(capsys, "serve", *args)
    assert status == 2
    assert said in error


def test_an_empty_folder_and_a_gguf_file_are_called_that(capsys, tmp_path):
    _, _, error = run(capsys, "serve", str(tmp_path))
    assert "is an empty folder" in error
    (tmp_path / "model.gguf").touch()
    _, _, error = run(capsys, "serve", str(tmp_path / "model.gguf"))
    assert "is not a folder but a GGUF file" in error


def test_a_wrong_variable_is_named_too(capsys, monkeypatch):
    monkeypatch.setenv("BITWATT_MAX_QUEUE", "-1")
    status, _, error = run(capsys, "serve")
    assert status == 2
    assert "BITWATT_MAX_QUEUE" in error


def test_an_empty_key_is_no_open_server(capsys, monkeypatch):
    monkeypatch.setenv("BITWATT_API_KEY", "")
    status, _, error = run(capsys, "serve")
    assert status == 2
    assert "BITWATT_API_KEY" in error


def test_the_port_of_a_kubernetes_service_is_passed_over(caplog, monkeypatch):
    monkeypatch.setenv("BITWATT_PORT", "tcp://10.0.0.1:8000")
    assert ServeSettings().port == 8000
    assert "BITWATT_PORT is tcp://10.0.0.1:8000" in caplog.text


def test_a_taken_port_ends_the_start_before_a_model_is_read(capfd, monkeypatch):
    monkeypatch.setattr(cli, "_serve_on", lambda *_: pytest.fail("the port is taken"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, error = run(capfd, "serve", "--port", str(port))
        logging.getLogger().handlers[0].flush()
        error += capfd.readouterr().err
    assert status == 1
    [line] = error.splitlines()
    assert f"can't listen on 127.0.0.1, port {port}: Address already in use" in line


def test_tune_refuses_a_shape_that_is_none(capsys):
    status, _, error = run(capsys, "tune", "--shapes", "2560x6912,12")
    assert status == 2
    assert "'12' is not OUTxIN" in error


def test_flags_that_are_not_there_are_refused(capsys):
    status, _, error = run(capsys, "serve", "--prot", "1")
    assert status == 2
    assert "--prot" in error


def test_a_variable_sets_what_a_flag_sets(monkeypatch):
    monkeypatch.setenv("BITWATT_MAX_NUM_SEQS", "7")
    monkeypatch.setenv("BITWATT_API_KEY", "a, b")
    monkeypatch.setenv("BITWATT_PREFIX_CACHING", "false")
    monkeypatch.setenv("BITWATT_CPU_ISA", "avx2")
    settings = ServeSettings()
    assert settings.max_num_seqs == 7
    assert len(settings.api_key) == 2
    assert not settings.prefix_caching
    assert settings.cpu_isa == "avx2"


def test_the_embedded_pair_is_served_without_a_path():
    ternary, dense = models_to_serve(make_settings())
    assert (ternary.name, ternary.weights, ternary.path.name) == ("builtin", "ternary", "ternary")
    assert (dense.name, dense.weights, dense.path.name) == ("builtin-fp16", "dense", "fp16")
    assert models_to_serve(make_settings(compare=False)) == [ternary]


def test_compare_serves_one_checkpoint_with_both_weights(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").touch()
    names = [m.name for m in models_to_serve(make_settings(path=folder, compare=True))]
    assert names == ["my-model", "my-model-fp16"]
    [only] = models_to_serve(make_settings(path=folder, served_model_name="x", weights="dense"))
    assert (only.name, only.weights) == ("x", "dense")


def test_fp16_is_another_name_of_dense_weights(tmp_path, monkeypatch):
    (tmp_path / "config.json").touch()
    assert make_settings(path=tmp_path, weights="fp16").weights == "dense"
    monkeypatch.setenv("BITWATT_WEIGHTS", "fp16")
    assert make_settings(path=tmp_path).weights == "dense"


def test_every_engine_setting_reaches_the_engine(tmp_path):
    unlike_the_defaults = {
        "device": "cuda:1",
        "backend": "torch",
        "dtype": "float32",
        "batch_invariant": True,
        "num_threads": 2,
        "cpu_isa": "portable",
        "max_model_len": 77,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 9,
        "kv_cache_bytes": 4096,
        "gpu_memory_utilization": 0.5,
        "prefix_caching": False,
        "head_bits": 8,
    }
    config = make_settings(**unlike_the_defaults).engine_config(tmp_path, "dense")
    assert config.model_path == str(tmp_path)
    assert config.weights == "dense"
    assert set(config.__struct_fields__) - {"model_path", "weights"} == unlike_the_defaults.keys()
    for name, value in unlike_the_defaults.items():
        assert getattr(config, name) == value
        assert getattr(EngineConfig(model_path=""), name) != value, "give it another value here"


def test_the_api_process_loads_no_torch():
    code = (
        "import sys, bitwatt.cli, bitwatt.api.app, bitwatt.api.server, bitwatt.engine.client\n"
        "print([m for m in ('torch', 'triton', 'numpy', 'bitwatt_kernels') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout.decode().strip() == "[]"


def help_of(capsys, *command):
    """Return a command's help, its lines joined."""
    status, out, _ = run(capsys, *command, "--help")
    assert status == 0
    return " ".join(out.split())


def test_the_help_says_what_each_command_does(capsys):
    told = help_of(capsys)
    for command, does in (
        ("serve", "Serve models"),
        ("compare", "Measure two models"),
        ("chat", "Talk to"),
        ("tune", "Find the fastest"),
    ):
        assert f" {command} {does}" in told


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_setting_says_meaning_unit_limits_and_default(capsys, command):
    told = help_of(capsys, command)
    for knob in knobs_of(COMMANDS[command]):
        assert knob.meaning[0].isupper()
        assert knob.help in told
        written = f"{knob.flag} {knob.value}".strip() if knob.flag.startswith("--") else knob.flag
        if knob.flag != "--prefix-caching":
            assert written in told
    # No Python type, and no value that no one can type.
    assert not re.search(r"(?<![-\w])(str|int|float|bool|tuple|bytes|null|None|Path)\b", told)


@pytest.mark.parametrize(
    "said",
    [
        "--api-key KEY[,KEY...] ",
        "--port PORT Port to listen on; 0 takes a free one (0 to 65535; default: 8000)",
        "--keep-alive SECONDS ",
        "(above 0, at most 3600; default: 10)",
        "(at least 2; default: the model's own limit)",
        "(default: the embedded pair)",
    ],
)
def test_the_help_is_in_a_persons_words(capsys, said):
    assert said in help_of(capsys, "serve")


def test_the_help_of_backend_names_every_backend(capsys):
    assert {*get_args(Backend)} == {*BACKENDS, "fake"}
    told = help_of(capsys, "serve")
    for name in BACKENDS:
        assert re.search(rf"Kernels: .*\b{name}\b.* \(default: the fastest that runs\)", told)


def test_a_backend_that_is_none_is_refused_with_those_there_are(capsys):
    status, _, error = run(capsys, "serve", "--backend", "cuda")
    assert status == 2
    assert "--backend 'cuda'" in error
    assert "'native', 'torch', 'triton', 'reference' or 'fake'" in error


def test_a_variable_without_our_prefix_is_no_setting(monkeypatch, tmp_path):
    """`JSON=...` in the environment once made `bitwatt compare` write that file."""
    monkeypatch.setenv("JSON", str(tmp_path / "somebody's"))
    monkeypatch.setenv("BITWATT_CLIENT_WINDOWS", "3")
    url = "http://127.0.0.1:1"
    settings = CompareSettings(url_a=url, url_b=url)
    assert settings.json_path is None
    assert settings.windows == 3
    assert CompareSettings(url_a=url, url_b=url, json="x.json").json_path == Path("x.json")
