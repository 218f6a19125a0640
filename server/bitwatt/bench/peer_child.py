"""A peer's side of peers.py: runs in a Python environment of its own, and knows no bitwatt.

python -P peer_child.py serve PACKAGE MODEL THREADS
    prints what it runs, then answers each line of standard input with the seconds it took:
    "decode N", a step of N sequences with CONTEXT tokens each, and "prefill N", a prompt of N
python -P peer_child.py tokens MODEL
    reads {"prompt": ids, "count": n, "texts": [...]} as JSON, answers
    {"version": ..., "greedy": ids, "encoded": [ids ...]}
"""

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

CONTEXT, WARMUP_STEPS, STEPS = 128, 3, 8
MAX_SEQUENCES, MAX_PROMPT = 8, 512
TOKEN = 7


class LlamaCpp:
    """llama.cpp through llama-cpp-python's C interface; sequences share one cached prefix."""

    def __init__(self, path: str, num_threads: int) -> None:
        import llama_cpp as api

        self.api = api
        api.llama_backend_init()
        model_params = api.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = api.llama_model_load_from_file(path.encode(), model_params)
        if not self.model:
            sys.exit(f"llama.cpp does not load {path}")
        params = api.llama_context_default_params()
        params.n_ctx = 2 * MAX_PROMPT + MAX_SEQUENCES * (WARMUP_STEPS + STEPS)
        params.n_batch = params.n_ubatch = MAX_PROMPT
        params.n_seq_max = MAX_SEQUENCES
        params.n_threads = params.n_threads_batch = num_threads
        self.set_up(params)
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            sys.exit(f"llama.cpp makes no context for {path}")
        self.batch = api.llama_batch_init(MAX_PROMPT, 0, 1)

    def set_up(self, params: Any) -> None:
        params.kv_unified = True

    def version(self) -> str:
        return f"llama-cpp-python {self.api.__version__}"

    def clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def share(self, sequence: int) -> None:
        memory = self.api.llama_get_memory(self.context)
        self.api.llama_memory_seq_cp(memory, 0, sequence, -1, -1)

    def run(self, tokens: list[tuple[int, int]], logits_from: int) -> None:
        """Run TOKEN at each (sequence, position); logits of those from logits_from on."""
        for i, (sequence, position) in enumerate(tokens):
            self.batch.token[i] = TOKEN
            self.batch.pos[i] = position
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = sequence
            self.batch.logits[i] = i >= logits_from
        self.batch.n_tokens = len(tokens)
        if self.api.llama_decode(self.context, self.batch):
            sys.exit("llama_decode failed")
        for i in range(logits_from, len(tokens)):
            self.api.llama_get_logits_ith(self.context, i)  # waits for them

    def prefill(self, count: int) -> float:
        self.clear()
        started = time.perf_counter()
        self.run([(0, position) for position in range(count)], count - 1)
        return time.perf_counter() - started

    def decode(self, count: int) -> float:
        begin = CONTEXT - (WARMUP_STEPS + STEPS) // 2
        self.prefill(begin)
        for sequence in range(1, count):
            self.share(sequence)
        for step in range(WARMUP_STEPS + STEPS):
            if step == WARMUP_STEPS:
                started = time.perf_counter()
            self.run([(sequence, begin + step) for sequence in range(count)], 0)
        return (time.perf_counter() - started) / STEPS


class IkLlamaCpp(LlamaCpp):
    """ik_llama.cpp, whose interface is an older one of llama.cpp's."""

    def __init__(self, path: str, num_threads: int) -> None:
        from ik_llama_cpp import _ctypes_api as api

        sys.modules["llama_cpp"] = api
        self.library = api._lib
        super().__init__(path, num_threads)

    def set_up(self, params: Any) -> None:
        pass

    def version(self) -> str:
        import ik_llama_cpp

        return f"ik-llama-cpp-python {ik_llama_cpp.__version__}"

    def clear(self) -> None:
        self.api.llama_kv_cache_clear(self.context)

    def share(self, sequence: int) -> None:
        copy = self.library.llama_kv_cache_seq_cp
        copy.argtypes = [ctypes.c_void_p, *[ctypes.c_int32] * 4]
        copy.restype = None
        copy(self.context, 0, sequence, -1, -1)


class Litespark:
    """litespark-inference without torch; it has no batches."""

    def __init__(self, path: str, num_threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(num_threads)  # before its library is loaded
        from litespark_inference.torchless import loader, runtime

        folder = Path(path)
        files = (folder / "config.json", folder / "model.safetensors")
        loader._resolve_hf_snapshot = lambda _: files
        self.runtime = runtime
        self.model = loader.load_bitnet_2b(embed_dtype="int8")
        self.state = runtime.init_state(self.model, 2 * MAX_PROMPT)

    def version(self) -> str:
        import litespark_inference

        return f"litespark-inference {litespark_inference.__version__}"

    def prefill(self, count: int) -> float:
        self.state.pos = 0
        started = time.perf_counter()
        self.runtime.forward_prefill(self.model, self.state, [TOKEN] * count)
        return time.perf_counter() - started

    def decode(self, count: int) -> float:
        if count != 1:
            raise ValueError("litespark-inference decodes one sequence at a time")
        self.prefill(CONTEXT - (WARMUP_STEPS + STEPS) // 2)
        for step in range(WARMUP_STEPS + STEPS):
            if step == WARMUP_STEPS:
                started = time.perf_counter()
            self.runtime.forward_one(self.model, self.state, TOKEN)
        return (time.perf_counter() - started) / STEPS


PEERS: dict[str, type[LlamaCpp] | type[Litespark]] = {
    "llama-cpp-python": LlamaCpp,
    "ik-llama-cpp-python": IkLlamaCpp,
    "litespark-inference": Litespark,
}


def serve(package: str, path: str, num_threads: str) -> None:
    peer = PEERS[package](path, int(num_threads))
    print(json.dumps({"version": peer.version()}), flush=True)
    for line in sys.stdin:
        kind, count = line.split()
        seconds = peer.prefill(int(count)) if kind == "prefill" else peer.decode(int(count))
        print(json.dumps({"seconds": seconds}), flush=True)


def tokens(path: str) -> None:
    import llama_cpp
    import numpy as np

    asked = json.load(sys.stdin)
    model = llama_cpp.Llama(path, n_gpu_layers=0, n_ctx=256, n_threads=2, verbose=False)
    model.eval(asked["prompt"])
    greedy = []
    for _ in range(asked["count"]):
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        greedy.append(int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax()))
        model.eval(greedy[-1:])
    encoded = [model.tokenize(text.encode(), add_bos=True, special=True) for text in asked["texts"]]
    told = {"version": llama_cpp.__version__, "greedy": greedy, "encoded": encoded}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", package, path, num_threads]:
            serve(package, path, num_threads)
        case ["tokens", path]:
            tokens(path)
        case _:
            sys.exit(__doc__)
