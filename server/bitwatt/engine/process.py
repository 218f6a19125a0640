"""An engine process: `python -m bitwatt.engine.process ADDRESS PARENT`, started by Supervisor.

Connects to the API process's socket, takes its configuration as the first message, loads the
model, and steps while there is work. Ends with its parent, whose process id is PARENT, and which
reads its standard error as process_log writes it.
"""

import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import zmq

from bitwatt.engine.core import EngineCore
from bitwatt.engine.messages import (
    MAX_STEPS_AHEAD,
    Abort,
    EngineConfig,
    EngineInfo,
    EngineMessage,
    EngineStats,
    Failed,
    Ready,
    StepOutputs,
    Submit,
    TokenBytes,
    TokenOutput,
    decode_to_engine,
    encode,
)
from bitwatt.engine.parent import end_with_parent
from bitwatt.engine.process_log import log_to_parent
from bitwatt.engine.process_memory import rss_anon_bytes
from bitwatt.errors import BitwattError

__all__ = ["HEARTBEAT_S", "main"]

HEARTBEAT_S = 0.5

_Builder = Callable[[EngineConfig], tuple[EngineCore, EngineInfo]]

logger = logging.getLogger("bitwatt.engine.process")  # run as __main__


class _Loop:
    """Moves messages between the socket and the core until the parent is gone."""

    def __init__(self, socket: zmq.Socket[bytes], core: EngineCore, parent_id: int) -> None:
        self._socket = socket
        self._core = core
        self._parent = parent_id
        self._rss_anon_bytes: int | None = None
        self._rss_read_at = 0.0

    def run(self) -> None:
        is_checked = True
        while os.getppid() == self._parent:
            is_busy = self._core.has_work
            outputs = self._receive(timeout_s=0 if is_busy else HEARTBEAT_S)
            if self._core.has_work:
                outputs += self._core.step()
                is_checked = False
            elif not is_checked:
                # Idle for a heartbeat: nobody waits while every block is looked at.
                self._core.check_integrity()
                is_checked = True
            else:
                self._core.time_memory(lambda: bool(self._socket.poll(0)))
            # Backpressure: while the API process is MAX_STEPS_AHEAD messages behind, the engine
            # stops stepping. Tokens computed meanwhile would only wait in the queue.
            _send(self._socket, StepOutputs(outputs=outputs, stats=self._stats()), self._parent)

    def _receive(self, timeout_s: float) -> list[TokenOutput]:
        outputs: list[TokenOutput] = []
        if not self._socket.poll(int(timeout_s * 1000)):
            return outputs
        while True:
            try:
                message = decode_to_engine(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return outputs
            match message:
                case Submit():
                    refused = self._core.submit(message)
                    if refused is not None:
                        outputs.append(refused)
                case TokenBytes():
                    self._core.learn_tokens(message)
                case Abort(request_ids):
                    outputs += self._core.abort(request_ids)
                case EngineConfig():
                    raise RuntimeError("the engine is configured once")

    def _stats(self) -> EngineStats:
        now = time.monotonic()
        if now - self._rss_read_at > HEARTBEAT_S:
            self._rss_read_at = now
            self._rss_anon_bytes = rss_anon_bytes()
        return self._core.stats(rss_anon_bytes=self._rss_anon_bytes)


def _send(socket: zmq.Socket[bytes], message: EngineMessage, parent_id: int) -> None:
    """Send the message once the parent is fewer than MAX_STEPS_AHEAD behind, if it still runs."""
    data = encode(message)
    while os.getppid() == parent_id:
        if socket.poll(int(HEARTBEAT_S * 1000), zmq.POLLOUT):
            socket.send(data)
            return


def _fail(socket: zmq.Socket[bytes], why: str, parent_id: int) -> NoReturn:
    """Send the engine's last words and wait to be killed, as the parent does on reading them.

    A process that ended by itself would take along what its parent has not yet read: libzmq drops
    what waits in the kernel's buffer of a connection whose other end is gone.
    """
    _send(socket, Failed(why), parent_id)
    while os.getppid() == parent_id:
        time.sleep(HEARTBEAT_S)
    sys.exit(1)


def _import_builder(config: EngineConfig) -> _Builder:
    """Return what builds the engine; raises ImportError or OSError.

    Imported here: torch takes seconds to load, in which the parent may die. Nearly all that an
    import makes stays, and to look for garbage among it took a fifth as long again.
    """
    gc.disable()
    try:
        if config.backend == "fake":
            from bitwatt.engine.fake import build_fake_engine

            return build_fake_engine
        from bitwatt.engine.build import build_engine

        return build_engine
    finally:
        gc.freeze()
        gc.enable()


def main() -> None:
    """Run the engine at the socket address, for the parent, given as arguments."""
    address, parent_id = sys.argv[1], int(sys.argv[2])
    end_with_parent(parent_id)
    log_to_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.rcvhwm = 0
        socket.sndhwm = MAX_STEPS_AHEAD
        socket.linger = 0
        socket.connect(address)
        config = decode_to_engine(socket.recv())
        if not isinstance(config, EngineConfig):
            raise TypeError(f"the first message is a {type(config).__name__}")
        try:
            build = _import_builder(config)
        except (ImportError, OSError) as error:  # no PyTorch, or one without its libraries
            _fail(socket, f"the engine can't be imported: {error}", parent_id)
        try:
            core, info = build(config)
        except BitwattError as error:
            _fail(socket, str(error), parent_id)
        gc.collect()
        gc.freeze()
        socket.send(encode(Ready(info)))
        try:
            _Loop(socket, core, parent_id).run()
        except Exception as error:
            logger.exception("the engine can't go on")
            why = f"the engine can't go on: {type(error).__name__}: {error}"
            _fail(socket, why, parent_id)
        finally:
            core.close()


if __name__ == "__main__":
    main()
