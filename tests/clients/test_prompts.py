"""Files of prompts."""

import pytest
from bitwatt_client.prompts import read_prompts, read_texts


def test_lines_and_json_lines_are_prompts(tmp_path):
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("first\n\n{second}\n", encoding="utf-8")
    lines.write_text('{"prompt": "first", "id": 1}\n{"prompt": "two\\nlines"}\n', encoding="utf-8")
    assert read_prompts(plain) == ("first", "{second}")
    assert read_prompts(lines) == ("first", "two\nlines")


@pytest.mark.parametrize("line", ["[]", "{}", '{"prompt": 3}', '{"prompt": " "}', "nope"])
def test_a_line_without_a_prompt_is_named(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "x"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2"):
        read_prompts(path)


def test_a_file_without_prompts_is_refused(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts(path)


def test_texts_have_their_lines_and_either_name(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n\n{"prompt": "b"}\n', encoding="utf-8")
    assert read_texts(path) == ((1, "a"), (3, "b"))
    path.write_text('{"text": "a"}\n{"texts": "b"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match='line 2: no "prompt" or "text" that is a string'):
        read_texts(path)


def test_a_line_separator_within_json_ends_no_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one\u2028two\x85three"}\n', encoding="utf-8")
    assert read_prompts(path) == ("one\u2028two\x85three",)


def test_a_line_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "x"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2: is not UTF-8"):
        read_prompts(path)
    path.write_text('{"prompt": "\\ud83d"}\n')
    with pytest.raises(ValueError, match="line 1: has half a character"):
        read_prompts(path)
