"""lm-evaluation-harness offline: choices, perplexity and generation, by completions and by chat.

Its tasks are of texts here. Token ids come from the model's folder, by transformers, and in one
case from the server's own /tokenizer_info and /tokenize. Perplexity is held to `bitwatt eval`'s.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from cases import REAL, run

BITWATT = os.environ.get("BITWATT_PYTHON", "")  # the interpreter that has bitwatt
TOKENIZER = os.environ.get("TOKENIZER", "")  # the embedded model's folder
WINDOW = 256  # tokens, as `bitwatt eval` has them
RELATIVE_TOLERANCE = 0.005  # of perplexity
FOLDER = Path(tempfile.mkdtemp())
OF_FOLDER = {
    "tokenizer": TOKENIZER,
    "tokenizer_backend": "huggingface",
    "max_length": WINDOW + 2,  # the harness leaves a token for the context and one to generate
}
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}
output_type: {kind}
test_split: test
doc_to_text: "{text}"
doc_to_target: {target}
{more}
metric_list: [{metrics}]
"""


def task(name, kind, rows, *, text, target, metrics, more=""):
    listed = ", ".join(f"{{metric: {metric}}}" for metric in metrics)
    (FOLDER / f"{name}.yaml").write_text(
        TASK.format(
            name=name, folder=FOLDER, kind=kind, text=text, target=target, metrics=listed, more=more
        )
    )
    (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def harness(name, **options):
    """Return the task's results by completions."""
    return results(name, "local-completions", "/v1/completions", "--batch_size", "8", **options)


def results(name, model, path, *flags, **options):
    """Return the task's results by a model of the harness's, whose route is the path."""
    told = {
        "base_url": REAL + path,
        "model": "builtin",
        "num_concurrent": 4,
        **options,
    }
    output = Path(tempfile.mkdtemp(dir=FOLDER))
    given = ",".join(f"{key}={value}" for key, value in told.items())
    command = ["-m", "lm_eval", "run", "--model", model, "--tasks", name, *flags]
    command += ["--include_path", str(FOLDER), "--output_path", str(output)]
    command += ["--model_args", given]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(FOLDER / "hub")}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-1500:]
    [found] = output.rglob("results_*.json")
    return json.loads(found.read_text())["results"][name]


QUESTIONS = [
    ("What does textwrap.dedent do?", "Remove any common leading whitespace from every line."),
    ("What does os.getcwd do?", "Return a string of the current working directory."),
]


def loglikelihood():
    """Each answer is likelier than one of the same length that is none."""
    rows = [
        {"question": question, "choices": [answer, "zq " * len(answer.split())], "gold": 0}
        for question, answer in QUESTIONS
    ]
    task(
        "choices",
        "multiple_choice",
        rows,
        text="{{question}}",
        target="gold",
        metrics=["acc"],
        more="doc_to_choice: choices",
    )
    assert harness("choices", **OF_FOLDER)["acc,none"] == 1


def loglikelihood_by_the_servers_tokenizer():
    loglikelihood_of = {"tokenizer_backend": "remote", "max_length": WINDOW + 2}
    assert harness("choices", **loglikelihood_of)["acc,none"] == 1


def rolling():
    texts, table = FOLDER / "heldout.jsonl", FOLDER / "eval.json"
    command = ["-m", "bitwatt", "eval", "--every", "20", "--window", str(WINDOW)]
    command += ["--save-text", str(texts), "--json", str(table)]
    subprocess.run([BITWATT, *command], check=True, capture_output=True, timeout=500)
    ours = json.loads(table.read_text())["models"]["ternary"]
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    task(
        "heldout",
        "loglikelihood_rolling",
        rows,
        text="",
        target="text",
        metrics=["bits_per_byte", "byte_perplexity"],
    )
    found = harness("heldout", **OF_FOLDER)
    num_bytes = sum(len(row["text"].encode()) for row in rows)
    nats = found["bits_per_byte,none"] * math.log(2) * num_bytes / ours["num_tokens"]
    print(
        f"perplexity of {ours['num_tokens']} tokens: lm_eval {math.exp(nats):.4f}, bitwatt eval "
        f"{ours['perplexity']:.4f}; bits a byte {found['bits_per_byte,none']:.5f}, "
        f"{ours['bits_per_byte']:.5f}",
        file=sys.stderr,
    )
    assert math.isclose(math.exp(nats), ours["perplexity"], rel_tol=RELATIVE_TOLERANCE)


def line(path, **asked):
    """Return the first choice of the line that the server answers with."""
    body = {"model": "builtin", "stop": ["\n"], "max_tokens": 24, "temperature": 0, **asked}
    request = urllib.request.Request(
        REAL + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]


def generation(name, questions, answers):
    """Make a task whose answers are the server's own."""
    task(
        name,
        "generate_until",
        [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)],
        text="{{question}}",
        target="answer",
        metrics=["exact_match"],
        more='generation_kwargs: {until: ["\\n"], max_gen_toks: 24, temperature: 0.0}',
    )


def generate_until():
    prompts = [f"def {name}(" for name in ("main", "read", "write")]
    # The harness puts no token before a prompt.
    told = {"add_special_tokens": False}
    lines = [line("/v1/completions", prompt=prompt, **told)["text"] for prompt in prompts]
    generation("generation", prompts, lines)
    assert harness("generation", **OF_FOLDER)["exact_match,none"] == 1


def chat():
    path, questions = "/v1/chat/completions", [question for question, _ in QUESTIONS]
    turns = [[{"role": "user", "content": question}] for question in questions]
    lines = [line(path, messages=messages)["message"]["content"] for messages in turns]
    generation("conversation", questions, lines)
    found = results("conversation", "local-chat-completions", path, "--apply_chat_template")
    assert found["exact_match,none"] == 1


if __name__ == "__main__":
    run(loglikelihood, loglikelihood_by_the_servers_tokenizer, rolling, generate_until, chat)
