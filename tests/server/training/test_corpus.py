from pathlib import Path

import pytest
from bitwatt.training.corpus import Corpus, is_held_out, load_corpus

LICENCE = "# One licence\n# of three lines\n# in every file.\n"


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus()


def write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def test_corpus_is_the_same_every_time(tmp_path: Path):
    names = ("b.py", "a.py", "pack/__init__.py", "test/test_a.py", "_sysconfigdata_x.py")
    write(tmp_path, {name: f"name = '{name}'\n" for name in names})
    first, second = load_corpus(tmp_path), load_corpus(tmp_path)
    assert first == second
    assert {document.name for document in first.train + first.held_out} == {
        "a.py",
        "b.py",
        "pack/__init__.py",
    }


def test_a_block_of_lines_is_kept_once_and_a_short_one_wherever_it_is(tmp_path: Path):
    short = "import os\n"
    texts = {f"{name}.py": f"{LICENCE}\n{short}\n{name} = 1\n" for name in "abc"}
    write(tmp_path, texts)
    corpus = load_corpus(tmp_path)
    text = "".join(document.text for document in corpus.train + corpus.held_out)
    assert text.count("# One licence") == 1
    assert text.count(short) == 3


def test_no_document_is_on_both_sides(corpus: Corpus):
    assert corpus.train
    assert corpus.held_out
    assert all(is_held_out(document.name) for document in corpus.held_out)
    assert not any(is_held_out(document.name) for document in corpus.train)


def test_modules_without_sources_are_there_by_their_help(corpus: Corpus):
    helped = {document.name: document.text for document in corpus.train + corpus.held_out}
    assert "builtins.len(obj, /)" in helped["help/builtins"]
    assert "help/json" not in helped


def test_tests_installed_packages_and_build_facts_stay_out(corpus: Corpus):
    for document in corpus.train + corpus.held_out:
        assert not {"test", "tests", "site-packages"}.intersection(document.name.split("/"))
        assert "_sysconfigdata" not in document.name
