"""The page's last minutes."""

from bitwatt.engine.messages import EngineStats
from bitwatt.telemetry.history import History


def make_history(*names):
    """Return a history whose clock goes on two seconds a sample."""
    times = iter(range(100, 10_000, 2))
    return History(names or ("m",), clock=lambda: float(next(times)))


def tokens(num_tokens, **more):
    return EngineStats(num_generation_tokens=num_tokens, **more)


def test_rates_are_counts_over_the_time_between_points():
    history = make_history()
    for stats in (tokens(10), tokens(30, num_prompt_tokens=8), tokens(30, num_prompt_tokens=8)):
        history.sample({"m": stats})
    times, series = history.since(0)
    assert times == [100, 102, 104]
    assert series["m"].generation_tokens_per_s == [None, 10, 0]
    assert series["m"].prompt_tokens_per_s == [None, 4, 0]


def test_an_engine_that_began_anew_counts_from_nothing():
    history = make_history()
    for stats in (tokens(100), None, tokens(6), tokens(10)):
        history.sample({"m": stats} if stats else {})
    assert history.since(0)[1]["m"].generation_tokens_per_s == [None, None, None, 2]
    history.sample({"m": tokens(4)})
    assert history.since(0)[1]["m"].generation_tokens_per_s[-1] == 2


def test_a_model_that_is_down_leaves_a_gap():
    history = make_history("m", "twin")
    history.sample({"m": tokens(1, num_blocks=8, num_blocks_used=2, num_running=1)})
    _, series = history.since(0)
    assert series["m"].kv_cache_usage == [0.25]
    assert series["m"].num_running == [1]
    assert series["twin"].num_running == series["twin"].kv_cache_usage == [None]


def test_only_points_after_the_time_asked_for_come():
    history = make_history()
    for _ in range(3):
        history.sample({"m": tokens(0)})
    assert history.since(102)[0] == [104]
    times, series = history.since(104)
    assert times == series["m"].num_waiting == []


def test_old_points_go():
    history = make_history()
    for _ in range(400):
        history.sample({})
    assert len(history.since(0)[0]) == 300
