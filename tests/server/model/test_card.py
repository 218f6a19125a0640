"""What a model's card says of its quality."""

import json

import pytest
from bitwatt import builtin
from bitwatt.model.card import SAME_TOKENS, quality_told

PAIR = """# A model

| tokens | loss |
|--:|--:|
| 1 | 2.0 |

| model | nats/token | bits/byte | tokens seen |
|---|--:|--:|--:|
| ternary | 4.486 | 1.933 | 1,000,448 |
| 16-bit twin | 4.349 | 1.874 | 1,000,448 |

## Limits
"""


def write_card(folder, text, *, model_type="bitnet"):
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(text)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def test_each_of_a_pair_has_its_own_row_of_one_evaluation(tmp_path):
    ternary = quality_told(write_card(tmp_path / "a", PAIR))
    twin = quality_told(write_card(tmp_path / "b", PAIR, model_type="llama"))
    assert (ternary.bits_per_byte, twin.bits_per_byte) == (1.933, 1.874)
    assert ternary.evaluation == twin.evaluation


def test_a_card_tells_of_the_tokens_it_was_trained_on_and_whether_its_twin_saw_the_same(tmp_path):
    ternary = quality_told(write_card(tmp_path / "a", PAIR))
    said = f"{PAIR}\nIt saw the {SAME_TOKENS.replace(' in', chr(10) + 'in')}.\n"
    twin = quality_told(write_card(tmp_path / "b", said, model_type="llama"))
    assert (ternary.num_tokens, ternary.has_same_tokens) == (1_000_448, False)
    assert (twin.num_tokens, twin.has_same_tokens) == (1_000_448, True)
    unknown = PAIR.replace("1,000,448", "many")
    assert quality_told(write_card(tmp_path / "c", unknown)).num_tokens is None


def test_figures_of_other_evaluations_are_told_apart(tmp_path):
    one = quality_told(write_card(tmp_path / "a", PAIR))
    other = quality_told(write_card(tmp_path / "b", PAIR.replace("1.874", "1.800")))
    assert one.evaluation != other.evaluation


def test_the_one_row_of_a_card_is_its_models(tmp_path):
    card = "| bits/byte |\n|--:|\n| 0.9 |"
    told = quality_told(write_card(tmp_path, card, model_type="llama"))
    assert told.bits_per_byte == 0.9


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bits/byte is 2",
        "| bits/byte |",
        "| bits/byte |\n|--:|",
        "| bits/byte |\n|--:|\n| good |",
        "| bits/byte |\n|--:|\n| nan |",
        "| bits/byte |\n|--:|\n| -1 |",
        "| model | bits/byte |\n|--|--:|\n| ternary |",
        "| model | bits/byte |\n|--|--:|\n| a | 1 |\n| b | 2 |",
    ],
)
def test_a_card_that_says_nothing_plain_says_nothing(tmp_path, text):
    assert quality_told(write_card(tmp_path, text)) is None


def test_a_folder_without_a_card_says_nothing(tmp_path):
    assert quality_told(tmp_path) is None
    (tmp_path / "README.md").write_text(PAIR)
    assert quality_told(tmp_path) is None
    (tmp_path / "config.json").write_text("[]")
    assert quality_told(tmp_path) is None


def test_the_embedded_pairs_cards_are_of_one_evaluation():
    ternary, twin = quality_told(builtin.TERNARY), quality_told(builtin.FP16)
    assert ternary.evaluation == twin.evaluation
    assert 0.5 < twin.bits_per_byte < ternary.bits_per_byte < 3
    assert twin.has_same_tokens
    assert twin.num_tokens == ternary.num_tokens > 0
