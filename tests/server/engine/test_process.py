"""The engine's loop between its socket and its core."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest
import zmq
from bitwatt.engine.build import build_engine
from bitwatt.engine.messages import (
    EngineConfig,
    Failed,
    Ready,
    StepOutputs,
    Submit,
    decode_from_engine,
    encode,
)
from bitwatt.engine.process import _fail, _Loop
from bitwatt.scheduling.request import ResolvedSampling


def test_an_engine_waits_for_a_reader_that_is_behind_and_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 97}))
    core, _ = build_engine(EngineConfig(model_path=str(tmp_path), backend="fake"))
    with (
        zmq.Context() as context,
        context.socket(zmq.PAIR) as ours,
        context.socket(zmq.PAIR) as its,
    ):
        ours.rcvhwm = its.sndhwm = 4
        ours.bind("inproc://engine")
        its.connect("inproc://engine")
        loop = _Loop(its, core, os.getppid())
        thread = Thread(target=loop.run)
        thread.start()
        try:
            ours.send(
                encode(
                    Submit(
                        request_id="a",
                        prompt_token_ids=[1],
                        sampling=ResolvedSampling(max_tokens=1000),
                    )
                )
            )
            num_steps = -1
            while (now := core.stats().num_steps) != num_steps or now == 0:
                num_steps = now
                time.sleep(0.05)
            assert num_steps < 20
            tokens: list[int] = []
            while len(tokens) < 1000:
                message = decode_from_engine(ours.recv())
                assert isinstance(message, StepOutputs)
                for output in message.outputs:
                    tokens += output.token_ids
        finally:
            loop._parent = -1  # as if the parent had gone
            thread.join()
    core.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it exits
def test_the_last_words_of_an_engine_reach_a_reader_that_is_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the socket full they were dropped, and the parent knew of an exit status alone."""
    parent_id = os.getppid()
    with (
        zmq.Context() as context,
        context.socket(zmq.PAIR) as ours,
        context.socket(zmq.PAIR) as its,
    ):
        ours.rcvhwm = its.sndhwm = 1
        ours.bind("inproc://engine")
        its.connect("inproc://engine")
        num_before = 0
        while its.poll(0, zmq.POLLOUT):
            its.send(b"a step's outputs")
            num_before += 1
        thread = Thread(target=_fail, args=(its, "no such block", parent_id))
        thread.start()
        for _ in range(num_before):
            assert ours.recv() == b"a step's outputs"
        message = decode_from_engine(ours.recv())
        assert thread.is_alive()  # until its parent kills it, or is gone
        monkeypatch.setattr(os, "getppid", lambda: parent_id + 1)
        thread.join()
    assert message == Failed("no such block")


@pytest.mark.parametrize("backend", [None, "fake"])
def test_an_engine_without_pytorch_says_so_and_the_fake_one_needs_none(
    tmp_path: Path, backend: str | None
) -> None:
    # "ended with status 1" was all that /ready and the log's last line said.
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 97}))
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    with zmq.Context() as context, context.socket(zmq.PAIR) as ours:
        ours.rcvtimeo = ours.sndtimeo = 60_000
        address = f"ipc://{tmp_path / 'engine'}"
        ours.bind(address)
        command = [sys.executable, "-m", "bitwatt.engine.process", address, str(os.getpid())]
        engine = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths})
        try:
            ours.send(encode(EngineConfig(model_path=str(tmp_path), backend=backend)))
            told = decode_from_engine(ours.recv())
        finally:
            engine.kill()
            engine.wait(timeout=60)
    if backend == "fake":
        assert isinstance(told, Ready)
    else:
        assert told == Failed("the engine can't be imported: No module named 'torch'")
