"""The papers' estimate, against the figures they printed."""

import pytest
from bitwatt.telemetry.energy.arithmetic import ModelShape, arithmetic_joules_per_token


def make_shape(hidden, intermediate, layers, heads, kv_heads, head_dim):
    width = heads * head_dim
    attention = hidden * (heads + 2 * kv_heads) * head_dim + width * hidden
    return ModelShape(
        num_linear_parameters=layers * (attention + 3 * hidden * intermediate),
        num_layers=layers,
        attention_width=width,
    )


B2B4T = make_shape(2560, 6912, 30, 20, 5, 128)

# The energy column of arXiv:2504.12285, table 1, with the models' published sizes.
COLUMN = {
    "LLaMA 3.2 1B": (make_shape(2048, 8192, 16, 32, 8, 64), "dense", 0.258),
    "Gemma-3 1B": (make_shape(1152, 6912, 26, 4, 1, 256), "dense", 0.186),
    "Qwen2.5 1.5B": (make_shape(1536, 8960, 28, 12, 2, 128), "dense", 0.347),
    "SmolLM2 1.7B": (make_shape(2048, 8192, 24, 32, 32, 64), "dense", 0.425),
    "MiniCPM 2B": (make_shape(2304, 5760, 40, 36, 36, 64), "dense", 0.649),
    "BitNet b1.58 2B": (B2B4T, "ternary", 0.028),
}


@pytest.mark.parametrize("model", COLUMN)
def test_512_tokens_give_the_reports_energy_column(model):
    shape, weights, joules = COLUMN[model]
    assert round(512 * arithmetic_joules_per_token(shape, weights, 512), 3) == joules


def test_the_saving_shrinks_with_the_context():
    def saving(context):
        return arithmetic_joules_per_token(B2B4T, "dense", context) / arithmetic_joules_per_token(
            B2B4T, "ternary", context
        )

    assert saving(0) == pytest.approx(71.4, abs=0.05)
    assert saving(512) == pytest.approx(20, abs=0.5)
    assert saving(4096) == pytest.approx(4.1, abs=0.1)
