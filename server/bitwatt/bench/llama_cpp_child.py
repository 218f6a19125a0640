"""llama.cpp's side of llama_cpp.py: runs in a Python environment of its own, and knows no bitwatt.

python llama_cpp_child.py write MODEL.gguf HEAD_BITS
                                              random weights of the 2B4T shape, TQ2_0, with an
                                              embedding, which is the head too, of f16 or q8_0
python llama_cpp_child.py serve MODEL.gguf    reads "decode" or "prefill" a line from standard
                                              input, answers each with the seconds it took
python llama_cpp_child.py tokens MODEL.gguf   reads {"prompt": ids, "count": n, "texts": [...]} as
                                              JSON, answers {"greedy": ids, "encoded": [ids ...]}
"""

import ctypes
import json
import sys
import time
from collections.abc import Callable
from itertools import product
from typing import Any

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCAB = 2560, 6912, 30, 20, 5, 128256
DECODE_TOKENS, PREFILL_TOKENS, NUM_THREADS = 64, 512, 2
BLOCK_WEIGHTS, BLOCK_CODE_BYTES = 256, 64  # TQ2_0: two bits a weight, then a float16 scale


def write(path: str, head_bits: str) -> None:
    import gguf
    import numpy as np

    rng = np.random.default_rng(0)
    codes = np.array(
        [a | b << 2 | c << 4 | d << 6 for a, b, c, d in product(range(3), repeat=4)], np.uint8
    )

    def ternary(rows: int, columns: int) -> Any:
        blocks = np.empty((rows, columns // BLOCK_WEIGHTS, BLOCK_CODE_BYTES + 2), np.uint8)
        blocks[..., :BLOCK_CODE_BYTES] = codes[
            rng.integers(0, len(codes), (*blocks.shape[:2], BLOCK_CODE_BYTES), np.uint8)
        ]
        scale = np.array([(1.5 / columns) ** 0.5], np.float16).view(np.uint8)
        blocks[..., BLOCK_CODE_BYTES:] = scale
        return blocks.reshape(rows, -1)

    writer = gguf.GGUFWriter(path, "bitnet")
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")
    embedding = rng.standard_normal((VOCAB, HIDDEN), np.float32) * 0.02
    if head_bits == "16":
        writer.add_tensor("token_embd.weight", embedding.astype(np.float16))
    else:
        q8_0 = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor("token_embd.weight", gguf.quantize(embedding, q8_0), raw_dtype=q8_0)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    kv_width = KV_HEADS * HIDDEN // HEADS
    linears = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (kv_width, HIDDEN),
        "attn_v": (kv_width, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }
    norms = {
        "attn_norm": HIDDEN,
        "attn_sub_norm": HIDDEN,
        "ffn_norm": HIDDEN,
        "ffn_sub_norm": INNER,
    }
    for layer in range(LAYERS):
        for name, shape in linears.items():
            writer.add_tensor(
                f"blk.{layer}.{name}.weight",
                ternary(*shape),
                raw_dtype=gguf.GGMLQuantizationType.TQ2_0,
            )
        for name, size in norms.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(path: str) -> None:
    import llama_cpp

    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
    if not model:
        sys.exit(f"llama.cpp does not load {path}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = 1024
    params.n_batch = params.n_ubatch = PREFILL_TOKENS
    params.n_threads = params.n_threads_batch = NUM_THREADS
    context = llama_cpp.llama_init_from_model(model, params)

    def run(tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        if llama_cpp.llama_decode(context, batch):
            sys.exit("llama_decode failed")

    def greedy() -> int:
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        values = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * VOCAB)).contents
        import numpy as np

        return int(np.ctypeslib.as_array(values).argmax())

    def clear() -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

    print(f"llama-cpp-python {llama_cpp.__version__}", flush=True)
    for line in sys.stdin:
        clear()
        started = time.perf_counter()
        if line.strip() == "prefill":
            run([7] * PREFILL_TOKENS)
            greedy()
        else:
            token = 7
            for _ in range(DECODE_TOKENS):
                run([token])
                token = greedy()
        print(time.perf_counter() - started, flush=True)


def tokens(path: str) -> None:
    import llama_cpp
    import numpy as np

    asked = json.load(sys.stdin)
    model = llama_cpp.Llama(path, n_gpu_layers=0, n_ctx=256, n_threads=NUM_THREADS, verbose=False)
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
    commands: dict[str, Callable[..., None]] = {"write": write, "serve": serve, "tokens": tokens}
    commands[sys.argv[1]](*sys.argv[2:])
