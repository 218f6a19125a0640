"""The sampler: each setting does what it says, and no row sees another."""

import pytest
import torch
from bitwatt.model.sampler import (
    LEAST_LOGPROB,
    Sampler,
    SamplingRow,
    TokenDrawer,
    TokenMasks,
    counter_uniform,
    drawing_settings,
)
from bitwatt.model.truncation_sampling import draw
from bitwatt.scheduling.request import ResolvedSampling
from bitwatt_kernels.registry import choose_backend

from tests.extent import TEST_ALL

pytestmark = pytest.mark.slow

VOCAB_SIZE = 50
CPU = torch.device("cpu")


def make_params(**settings: object) -> ResolvedSampling:
    return ResolvedSampling(max_tokens=10, **settings)  # type: ignore[arg-type]


def make_row(row: int = 0, position: int = 0, num_output_tokens: int = 0, **settings: object):
    return SamplingRow(row, position, num_output_tokens, make_params(**settings))


def make_logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 2


def draw_many(logits: torch.Tensor, count: int = 4000, **settings: object) -> torch.Tensor:
    """Counts of each token over `count` positions of one seed, [VOCAB_SIZE]."""
    rows = [make_row(position=i, seed=1, **settings) for i in range(count)]
    sampler = Sampler(1, VOCAB_SIZE, CPU)
    tokens = sampler.sample(logits.expand(count, -1).clone(), rows).tokens
    return torch.bincount(tokens, minlength=VOCAB_SIZE)


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits = make_logits(3)
    sampled = Sampler(4, VOCAB_SIZE, CPU).sample(logits.clone(), [make_row(temperature=0.0)] * 3)
    assert sampled.tokens.tolist() == logits.argmax(-1).tolist()


def test_tokens_drawn_are_taken_only_where_nothing_changes_the_logits() -> None:
    sampler = Sampler(2, 8, torch.device("cpu"))
    logits = torch.tensor([[0.0, 3, 0, 0, 0, 0, 0, 0]])
    known = torch.tensor([5])  # no argmax of these, so that it shows
    greedy = make_row(temperature=0.0)
    assert sampler.sample(logits.clone(), [greedy], drawn=known.clone()).tokens.tolist() == [5]
    for row in (
        make_row(temperature=0.0, logit_bias={1: -100.0, 2: 9.0}),
        make_row(temperature=0.0, min_tokens=1, stop_token_ids=(1,), logit_bias={2: 1.0}),
    ):
        drawn = sampler.sample(logits.clone(), [row], drawn=known.clone())
        assert drawn.tokens.tolist() == [2]
    masks = TokenMasks([0], packed([{6}]), {})
    drawn = sampler.sample(logits.clone(), [greedy], masks, drawn=known.clone())
    assert drawn.tokens.tolist() == [6]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    logits = make_logits(1)
    frequencies = draw_many(logits, temperature=temperature) / 4000
    expected = (logits[0] / temperature).softmax(-1)
    # Three standard deviations of the largest binomial.
    assert (frequencies - expected).abs().max() < 3 * 0.5 / 4000**0.5


def test_top_k_leaves_k_tokens() -> None:
    logits = make_logits(1)
    drawn = draw_many(logits, top_k=3).nonzero()[:, 0]
    assert set(drawn.tolist()) == set(logits[0].topk(3).indices.tolist())


def test_top_p_leaves_the_smallest_set_that_reaches_p() -> None:
    logits = torch.full((1, VOCAB_SIZE), -torch.inf)
    logits[0, :4] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert draw_many(logits, top_p=0.79).nonzero()[:, 0].tolist() == [0, 1]
    assert draw_many(logits, top_p=0.81).nonzero()[:, 0].tolist() == [0, 1, 2]
    assert draw_many(logits, top_p=1e-9).nonzero()[:, 0].tolist() == [0]
    assert draw_many(logits, top_p=0.0).nonzero()[:, 0].tolist() == [0]


def test_min_p_drops_what_is_less_likely_than_a_share_of_the_best() -> None:
    logits = torch.full((1, VOCAB_SIZE), -torch.inf)
    logits[0, :3] = torch.tensor([0.6, 0.31, 0.09]).log()
    assert draw_many(logits, min_p=0.5).nonzero()[:, 0].tolist() == [0, 1]


FILTERS = [
    {"top_k": 1},
    {"top_k": 700},
    {"top_k": 1500},
    {"top_k": 10**6, "min_p": 0.01},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.999999},
    {"top_k": 1100, "top_p": 0.8},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.05},
]


def left_by_sorting(logits: torch.Tensor, p: ResolvedSampling) -> torch.Tensor:
    """What the filters leave of a row, as their definitions read: the whole row sorted."""
    logits = logits / p.temperature
    order = logits.sort(descending=True, stable=True).indices
    weights = logits.softmax(-1)[order].double()
    if p.top_k:
        weights[p.top_k :] = 0
    before = weights.cumsum(0) - weights
    if p.top_p < 1:
        weights[1:][before[1:] >= p.top_p * weights.sum()] = 0
    weights[weights < p.min_p * weights[0]] = 0
    left = torch.zeros_like(weights)
    left[order] = weights
    return left / left.sum()


@pytest.mark.parametrize("settings", FILTERS, ids=str)
@pytest.mark.parametrize("shape", ["peaked", "flat", "tied"])
def test_filters_of_a_large_vocabulary_leave_what_sorting_it_would(
    shape: str, settings: dict[str, float]
) -> None:
    """More tokens than are ranked at first; flat rows reach past them, tied ones end in a tie."""
    params = make_params(temperature=0.8, **settings)
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(4))
    logits = {"peaked": logits * 6, "flat": logits / 10, "tied": logits.round()}[shape]
    expected = left_by_sorting(logits[0], params)
    count = 3000 if TEST_ALL else 500
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = draw(logits.expand(count, -1), [params] * count, uniform)
    frequencies = torch.bincount(tokens, minlength=5000) / count
    assert expected[tokens].min() > 0
    # An even grid meets each token's interval as often as its length, to one at each end.
    assert (frequencies - expected).abs().max() < 2 / count


def test_the_largest_uniform_number_draws_a_token_that_has_a_weight() -> None:
    logits = torch.full((1, 3000), -torch.inf)
    logits[0, [5, 7]] = 0.0
    almost_one = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    for settings in ({}, {"top_k": 2}, {"top_p": 0.9999}):
        assert draw(logits, [make_params(**settings)], almost_one).tolist() == [7]


def test_same_seed_and_position_draw_the_same_token_in_any_batch() -> None:
    kinds = [
        {},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 0.0},
        {"temperature": 0.3, "top_p": 0.95, "top_k": 20},
        {"logit_bias": {3: 5.0}},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    ]
    rows = [make_row(i, 10 + i, i, seed=i, **kinds[i % len(kinds)]) for i in range(32)]
    logits = make_logits(32)

    def draw(chosen: list[int]) -> list[int]:
        sampler = Sampler(32, VOCAB_SIZE, CPU)
        for i in chosen:
            sampler.begin(i, prompt=[i, i + 1], outputs=[i + 2] * i)
        return sampler.sample(logits[chosen].clone(), [rows[i] for i in chosen]).tokens.tolist()

    together = draw(list(range(32)))
    assert together == [draw([i])[0] for i in range(32)]
    assert together[5:9] == draw([5, 6, 7, 8])


def test_penalties_follow_their_formulas() -> None:
    sampler = Sampler(2, VOCAB_SIZE, CPU)
    sampler.begin(1, prompt=[4], outputs=[5, 5, 6])
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 4:8] = torch.tensor([2.0, 4.0, -1.0, 3.0])
    row = make_row(
        1, temperature=0.0, repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.5
    )
    sampled = sampler.sample(logits, [row])
    # 4: 2/2; 5: 4/2 - 2·0.25 - 0.5; 6: -1·2 - 0.25 - 0.5; 7 was neither read nor written.
    assert logits[0, 4:8].tolist() == [1.0, 1.0, -2.75, 3.0]
    assert sampled.tokens.tolist() == [7]


def test_drawn_tokens_count_for_the_next_penalty() -> None:
    sampler = Sampler(1, VOCAB_SIZE, CPU)
    sampler.begin(0, prompt=[1], outputs=[])
    row = make_row(temperature=0.0, presence_penalty=1.5)
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 9], logits[0, 8] = 3.0, 2.0
    assert [int(sampler.sample(logits.clone(), [row]).tokens) for _ in range(2)] == [9, 8]


def test_a_row_taken_over_forgets_the_request_before() -> None:
    sampler = Sampler(1, VOCAB_SIZE, CPU)
    sampler.begin(0, prompt=[1], outputs=[9] * 5)
    sampler.begin(0, prompt=[1], outputs=[])
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 9] = 1.0
    row = make_row(temperature=0.0, frequency_penalty=1.0)
    assert int(sampler.sample(logits, [row]).tokens) == 9


def test_logit_bias_can_force_and_ban() -> None:
    logits = make_logits(1)
    best = int(logits.argmax())
    forced = make_row(temperature=0.0, logit_bias={17: 100.0})
    banned = make_row(temperature=0.0, logit_bias={best: -100.0})
    tokens = Sampler(1, VOCAB_SIZE, CPU).sample(logits.repeat(2, 1), [forced, banned]).tokens
    assert tokens[0] == 17
    assert tokens[1] != best


def test_no_stop_token_is_drawn_before_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 5] = 10.0
    sampler = Sampler(1, VOCAB_SIZE, CPU)

    def draw(num_output_tokens: int) -> int:
        row = make_row(0, 0, num_output_tokens, temperature=0.0, min_tokens=2, stop_token_ids=(5,))
        return int(sampler.sample(logits.clone(), [row]).tokens)

    assert draw(1) != 5
    assert draw(2) == 5


def test_logprobs_are_those_of_the_model_before_any_setting() -> None:
    logits = make_logits(2)
    rows = [make_row(temperature=0.2, top_k=1, logprobs=3, logit_bias={2: 50.0}), make_row()]
    sampled = Sampler(1, VOCAB_SIZE, CPU).sample(logits.clone(), rows)
    expected = logits.log_softmax(-1)
    assert sampled.tokens[0] == 2
    assert sampled.logprobs is not None
    torch.testing.assert_close(sampled.logprobs.sampled[0], expected[0, 2])
    torch.testing.assert_close(sampled.logprobs.top_values[0], expected[0].topk(3).values)
    assert sampled.logprobs.top_tokens[0].tolist() == expected[0].topk(3).indices.tolist()


def test_counter_generator_is_uniform_and_its_streams_differ() -> None:
    many = torch.from_numpy(counter_uniform([3] * 20000, range(20000)))
    assert many.min() >= 0
    assert many.max() < 1
    assert abs(float(many.mean()) - 0.5) < 3 / 12**0.5 / 20000**0.5
    lag = torch.corrcoef(torch.stack([many[:-1], many[1:]]))[0, 1]
    assert abs(float(lag)) < 4 / 20000**0.5
    streams = torch.from_numpy(counter_uniform(range(20000), [5] * 20000))
    assert abs(float(streams.mean()) - 0.5) < 3 / 12**0.5 / 20000**0.5
    assert counter_uniform([-1], [0]) != counter_uniform([1], [0])


def packed(allowed: list[set[int]]) -> torch.Tensor:
    words = VOCAB_SIZE // 32 + 1
    bits = [sum(1 << token for token in tokens) for tokens in allowed]
    data = b"".join(mask.to_bytes(4 * words, "little") for mask in bits)
    return torch.frombuffer(bytearray(data), dtype=torch.int32).view(len(allowed), words)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 2},
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.0, "frequency_penalty": 2.0},
        {"temperature": 1.0, "logit_bias": {9: 100.0}},
    ],
)
def test_a_masked_row_draws_what_its_mask_allows_and_the_others_what_they_would(
    settings: dict[str, object],
) -> None:
    logits = make_logits(3)
    sampler, free = Sampler(4, VOCAB_SIZE, CPU), Sampler(4, VOCAB_SIZE, CPU)
    for row in range(3):
        sampler.begin(row, [1, 2], [3, 3])
        free.begin(row, [1, 2], [3, 3])
    allowed = [{3, 40}, {0, VOCAB_SIZE - 1}]
    masks = TokenMasks([0, 2], packed(allowed), {})
    for position in range(50):
        rows = [make_row(row, position, 2, seed=5, **settings) for row in range(3)]
        tokens = sampler.sample(logits.clone(), rows, masks).tokens.tolist()
        assert tokens[0] in allowed[0]
        assert tokens[1] == free.sample(logits.clone(), rows).tokens[1]
        assert tokens[2] in allowed[1]


def test_masks_of_all_rows_are_of_their_own_in_any_order() -> None:
    masks = TokenMasks([2, 0, 1], packed([{4}, {5}, {6}]), {})
    rows = [make_row(row, temperature=1.0) for row in range(3)]
    sampled = Sampler(4, VOCAB_SIZE, CPU).sample(make_logits(3), rows, masks)
    assert sampled.tokens.tolist() == [5, 6, 4]


@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_backends_drawer_draws_the_same_tokens_and_fails_the_same_rows(
    logprobs: int | None,
) -> None:
    """Of rows with and without a mask, a mask of nothing, ties, infinities and NaN."""
    drawer = choose_backend(CPU).backend
    if not isinstance(drawer, TokenDrawer):
        pytest.skip("the native kernels are not built")
    generator = torch.Generator().manual_seed(3)
    greedy = {"temperature": 0.0, "logprobs": logprobs}
    kinds = [greedy, {}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.1}]
    rows = [make_row(row, 4, 1, seed=row, **kinds[row % 5]) for row in range(20)]
    for _ in range(20):
        logits = torch.randn(20, VOCAB_SIZE, generator=generator).mul(2).round()
        for value in (torch.nan, torch.inf, -torch.inf):
            logits[torch.rand(20, VOCAB_SIZE, generator=generator) < 0.02] = value
        masked = torch.randperm(20, generator=generator)[:12].tolist()
        bits = torch.randint(-(2**31), 2**31, (12, 2), generator=generator).int()
        bits[0] = 0
        masks = TokenMasks(masked, bits, {masked[0]: "nothing is left"})
        ours, theirs = (
            Sampler(20, VOCAB_SIZE, CPU, one).sample(logits.clone(), rows, masks)
            for one in (drawer, None)
        )
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.failures == theirs.failures
        if ours.logprobs is None or theirs.logprobs is None:
            assert ours.logprobs is theirs.logprobs is None is logprobs
            continue
        found, expected = ours.logprobs.sampled, theirs.logprobs.sampled
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_step_that_draws_nothing_has_no_settings() -> None:
    assert drawing_settings([]).shape == (0, 6)


def test_a_mask_of_no_tokens_fails_its_row_alone_and_says_why() -> None:
    masks = TokenMasks([1], packed([set()]), {1: "its grammar can't go on"})
    rows = [make_row(row, temperature=1.0, logprobs=3) for row in range(3)]
    sampled = Sampler(4, VOCAB_SIZE, CPU).sample(make_logits(3), rows, masks)
    assert [token >= 0 for token in sampled.tokens.tolist()] == [True, False, True]
    assert sampled.failures == {1: "its grammar can't go on"}


def test_log_probabilities_are_of_what_a_mask_leaves() -> None:
    logits = make_logits(2)
    masks = TokenMasks([0], packed([{3, 40}]), {})
    rows = [make_row(row, temperature=0.0, logprobs=4) for row in range(2)]
    batch = Sampler(4, VOCAB_SIZE, CPU).sample(logits.clone(), rows, masks).logprobs
    assert batch is not None
    expected = logits[0, [3, 40]].log_softmax(-1).sort(descending=True).values
    assert torch.allclose(batch.top_values[0, :2], expected)
    assert batch.top_values[0, 2:].tolist() == [LEAST_LOGPROB] * 2
    assert torch.equal(batch.top_values[1], logits[1].log_softmax(-1).topk(4).values)
