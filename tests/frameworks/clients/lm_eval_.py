"""lm-evaluation-harness's `local-completions`: choices, perplexity and generation, offline.

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
    """Return the task's results."""
    told = {
        "base_url": f"{REAL}/v1/completions",
        "model": "builtin",
        "num_concurrent": 4,
        **options,
    }
    output = Path(tempfile.mkdtemp(dir=FOLDER))
    given = ",".join(f"{key}={value}" for key, value in told.items())
    command = ["-m", "lm_eval", "run", "--model", "local-completions", "--tasks", name]
    command += ["--include_path", str(FOLDER), "--output_path", str(output)]
    command += ["--batch_size", "8", "--model_args", given]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(FOLDER / "hub")}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-1500:]
    [path] = output.rglob("results_*.json")
    return json.loads(path.read_text())["results"][name]


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


def continued(prompt):
    """Return the line that the server goes on with; the harness puts no token before a prompt."""
    body = {"model": "builtin", "prompt": prompt, "stop": ["\n"], "max_tokens": 24}
    body |= {"temperature": 0, "add_special_tokens": False}
    request = urllib.request.Request(
        f"{REAL}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]["text"]


def generate_until():
    prompts = [f"def {name}(" for name in ("main", "read", "write")]
    rows = [{"question": prompt, "answer": continued(prompt)} for prompt in prompts]
    task(
        "generation",
        "generate_until",
        rows,
        text="{{question}}",
        target="answer",
        metrics=["exact_match"],
        more='generation_kwargs: {until: ["\\n"], max_gen_toks: 24, temperature: 0.0}',
    )
    assert harness("generation", **OF_FOLDER)["exact_match,none"] == 1


if __name__ == "__main__":
    run(loglikelihood, loglikelihood_by_the_servers_tokenizer, rolling, generate_until)
