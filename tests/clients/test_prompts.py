"""Files of prompts."""

import pytest
from bitwatt_client.prompts import read_prompts


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
