"""Drafts: what is guessed of a request's next tokens, when, and how the scheduler plans it."""

import random

import pytest
from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.drafting import MAX_DRAFT_TOKENS, Drafter, StepCost
from bitwatt.scheduling.plan import Plan, max_draws
from bitwatt.scheduling.request import Request, ResolvedSampling
from bitwatt.scheduling.scheduler import Scheduler
from hypothesis import given
from hypothesis import strategies as st

TEXT = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]


def drafted(drafter: Drafter) -> list[int]:
    return drafter.draft(drafter.num_worthwhile())


def test_what_followed_the_last_three_tokens_is_drafted() -> None:
    drafter = Drafter([*TEXT, 99, 12, 13, 14])
    assert drafter.num_worthwhile() > 0
    assert drafter.draft(4) == [15, 16, 17, 18]
    assert drafter.draft(2) == [15, 16]


def test_nothing_is_drafted_where_nothing_repeats() -> None:
    for tokens in ([1], [1, 2], [1, 2, 3], TEXT, [*TEXT, 12, 13]):
        drafter = Drafter(list(tokens))
        assert drafter.num_worthwhile() == 0
        assert drafter.draft(15) == []


def test_the_longer_the_match_the_longer_the_draft() -> None:
    source = list(range(100, 160))
    tokens = [*source, 100, 101, 102]
    drafter = Drafter(tokens)
    lengths = []
    for token in source[3:40]:
        lengths.append(len(drafted(drafter)))
        tokens.append(token)
    assert lengths == sorted(lengths)
    assert 1 <= lengths[0] <= 4
    assert lengths[-1] == MAX_DRAFT_TOKENS


def test_the_more_run_the_less_is_drafted_and_the_more_rows_are_free_the_more() -> None:
    source = list(range(100, 130))
    tokens = [*source, *source[:3]]
    drafter = Drafter(tokens)
    for token in source[3:20]:
        drafter.num_worthwhile()
        tokens.append(token)
    by_running = [drafter.num_worthwhile(num_running=n, free_rows=4.0) for n in (1, 4, 16, 64)]
    assert by_running == sorted(by_running, reverse=True)
    assert by_running[0] > 0
    assert by_running[-1] == 0
    by_rows = [drafter.num_worthwhile(num_running=8, free_rows=r) for r in (1.0, 8.0, 64.0)]
    assert by_rows == sorted(by_rows)
    assert by_rows[0] < by_rows[-1]


def test_a_draft_that_comes_to_the_end_goes_on_with_itself() -> None:
    tokens = [7, 1, 2, 1, 2, 1, 2]
    assert Drafter(tokens).draft(4) == [1, 2, 1, 2]
    assert Drafter([5] * 30).draft(4) == [5] * 4


def test_a_single_edit_in_a_long_match_is_passed_over() -> None:
    source = list(range(100, 160))
    tokens = [*source, *source[:3]]
    drafter = Drafter(tokens)
    for token in source[3:20]:
        assert drafter.num_worthwhile() > 0
        tokens.append(token)
    assert drafter.draft(3) == source[20:23]
    tokens.append(7)  # in place of the next
    assert drafter.draft(3) == source[21:24]
    tokens.append(8)  # and of one more: now it must be found again
    assert drafter.draft(3) == []
    tokens += source[30:33]
    assert drafter.draft(3) == source[33:36]


def test_whose_matches_mislead_drafts_no_more_until_they_foretell_again() -> None:
    chance = random.Random(0)
    tokens = [chance.randrange(6) for _ in range(3)]
    drafter = Drafter(tokens)
    num_drafted = 0
    for _ in range(400):  # three tokens soon have stood before, with any behind them
        tokens.append(chance.randrange(6))
        num_drafted += len(drafted(drafter))
    assert 1 <= num_drafted <= 20
    source = [chance.randrange(10, 10_000) for _ in range(100)]
    tokens += source
    num_matched = 0
    while not drafted(drafter):
        tokens.append(source[num_matched])
        num_matched += 1
    assert 3 < num_matched < 60


def test_a_request_that_never_repeated_itself_drafts_at_its_first_match() -> None:
    chance = random.Random(0)
    tokens = [chance.randrange(10_000) for _ in range(400)]
    drafter = Drafter(tokens)
    for _ in range(100):
        tokens.append(chance.randrange(10_000))
        assert not drafted(drafter)
    tokens += tokens[:3]
    assert drafted(drafter)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.data())
def test_a_draft_is_within_its_limit_and_made_of_known_tokens(
    tokens: list[int], data: st.DataObject
) -> None:
    """However the tokens come: one by one or many at once."""
    known = tokens[:1]
    drafter = Drafter(known)
    while len(known) < len(tokens):
        num_running = data.draw(st.integers(1, 20))
        drafts = drafter.draft(drafter.num_worthwhile(num_running=num_running))
        assert len(drafts) <= MAX_DRAFT_TOKENS
        assert set(drafts) <= set(known)
        known += tokens[len(known) : len(known) + data.draw(st.integers(1, 5))]


def test_a_steps_cost_is_learnt_from_steps_of_several_sizes() -> None:
    cost = StepCost()
    prior = cost.free_rows
    for _ in range(20):
        cost.observe(8, 0.060 + 8 * 0.004)
    assert cost.free_rows == prior  # of one size nothing follows
    for i in range(100):
        num_tokens = 1 + i % 16
        cost.observe(num_tokens, 0.060 + num_tokens * 0.004)
    assert cost.free_rows == pytest.approx(15.0)
    for i in range(500):  # another load: rows are free
        cost.observe(1 + i % 16, 0.050)
    assert cost.free_rows == 128.0
    for i in range(500):  # and nothing is
        cost.observe(1 + i % 16, (1 + i % 16) * 0.004)
    assert cost.free_rows == 1.0


def make_scheduler(**limits: int) -> Scheduler:
    return Scheduler(
        BlockAllocator(limits.get("num_blocks", 64), 4),
        max_num_seqs=limits.get("max_num_seqs", 4),
        max_num_batched_tokens=64,
        max_model_len=128,
        speculates=True,
    )


def make_request(name: str, *, max_tokens: int = 50, priority: int = 0) -> Request:
    prompt = [1, 2, 3, 4, 5, 6] * 3
    sampling = ResolvedSampling(max_tokens=max_tokens)
    return Request(request_id=name, prompt_token_ids=prompt, sampling=sampling, priority=priority)


def add_trusted(scheduler: Scheduler, request: Request) -> None:
    """Add a request whose matches have always foretold what came."""
    scheduler.add(request)
    assert request.drafter is not None
    request.drafter._hits = 30.0


def begin_to_verify(scheduler: Scheduler, request: Request) -> Plan:
    """Return the plan that verifies the first drafts of a request just added."""
    scheduler.commit(scheduler.plan(), [1])
    plan = scheduler.plan()
    [chunk] = [chunk for chunk in plan.chunks if chunk.request is request]
    assert chunk.drafts
    assert chunk.start == 18
    assert chunk.num_drawn == chunk.num_tokens == 1 + len(chunk.drafts)
    return plan


def test_a_request_is_in_no_other_step_while_its_drafts_are_verified() -> None:
    scheduler = make_scheduler()
    request = make_request("x")
    add_trusted(scheduler, request)
    plan = begin_to_verify(scheduler, request)
    assert scheduler.plan().chunks == []
    [chunk] = plan.chunks
    [committed] = scheduler.commit(plan, [*chunk.drafts, 77])
    assert committed.tokens == [*chunk.drafts, 77]
    [chunk] = scheduler.plan().chunks
    assert (chunk.start, chunk.num_tokens, chunk.is_pending) == (len(request.tokens) - 1, 1, False)


def test_what_follows_a_wrong_draft_is_dropped_and_computed_again() -> None:
    scheduler = make_scheduler()
    request = make_request("x")
    add_trusted(scheduler, request)
    plan = begin_to_verify(scheduler, request)
    [chunk] = plan.chunks
    [committed] = scheduler.commit(plan, [chunk.drafts[0], 77, *chunk.drafts[1:]])
    assert committed.tokens == [chunk.drafts[0], 77]
    scheduler.check_integrity()
    [chunk] = scheduler.plan().chunks
    assert chunk.start == 20
    counters = scheduler.counters
    assert (counters.num_drafts, counters.num_accepted_tokens) == (1, 1)
    assert counters.num_generation_tokens == 3


def test_a_wrong_draft_never_enters_the_prefix_cache() -> None:
    """Of blocks of 4 tokens, the drafts fill one and a half."""
    scheduler = make_scheduler()
    request = make_request("x", max_tokens=3 + 15)
    add_trusted(scheduler, request)
    plan = begin_to_verify(scheduler, request)
    drafts = list(plan.chunks[0].drafts)
    scheduler.commit(plan, [77, *drafts[1:], 5])
    while scheduler.has_work:
        plan = scheduler.plan()
        num_drawn = sum(chunk.num_drawn for chunk in plan.chunks)
        scheduler.commit(plan, [99 + i for i in range(num_drawn)])
    wrong = [*request.prompt_token_ids, 1, *drafts, 0]
    blocks, _ = scheduler.blocks.match(wrong, "")
    assert len(blocks) == len(request.prompt_token_ids) // 4
    blocks, _ = scheduler.blocks.match([*request.tokens, 0], "")
    assert len(blocks) == (len(request.tokens) - 1) // 4


def test_a_request_preempted_while_its_drafts_are_verified_keeps_what_they_brought() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    request = make_request("x")
    add_trusted(scheduler, request)
    plan = begin_to_verify(scheduler, request)
    drafts = plan.chunks[0].drafts
    scheduler.add(make_request("sooner", max_tokens=1, priority=-1))
    other = scheduler.plan()
    assert [chunk.request.request_id for chunk in other.chunks] == ["sooner"]
    [committed] = scheduler.commit(plan, [*drafts, 77])
    assert committed.tokens == [*drafts, 77]
    scheduler.check_integrity()
    scheduler.commit(other, [1])
    [chunk] = scheduler.plan().chunks
    assert chunk.request is request
    assert chunk.start + chunk.num_tokens == len(request.tokens)
    assert not chunk.drafts


def test_nothing_runs_beside_a_verification_and_one_that_fails_ends_its_requests_alone() -> None:
    scheduler = make_scheduler()
    request = make_request("x")
    add_trusted(scheduler, request)
    failing = begin_to_verify(scheduler, request)
    other = make_request("y")
    scheduler.add(other)
    assert scheduler.plan().chunks == []
    assert scheduler.give_up(failing, None) == [request]
    scheduler.check_integrity()
    [chunk] = scheduler.plan().chunks
    assert chunk.request is other
    assert not chunk.drafts


def test_requests_that_draft_and_those_that_do_not_share_their_steps() -> None:
    scheduler = make_scheduler()
    plain = make_request("plain")
    plain.prompt_token_ids[:] = plain.tokens[:] = range(100, 118)
    for one in (make_request("x"), plain):
        add_trusted(scheduler, one)
    scheduler.commit(scheduler.plan(), [1, 118])
    for step in range(3):
        plan = scheduler.plan()
        drafting, alone = plan.chunks
        assert (drafting.num_drawn > 1, alone.num_drawn) == (True, 1)
        assert scheduler.plan().chunks == []
        following = [drafting.drafts[-1] % 6 + 1]
        scheduler.commit(plan, [*drafting.drafts, *following, 119 + step])
    scheduler.check_integrity()


def test_drafts_take_no_block_that_is_not_there_and_preempt_nobody() -> None:
    scheduler = make_scheduler(num_blocks=6)
    request = make_request("x", max_tokens=6)
    add_trusted(scheduler, request)
    plan = begin_to_verify(scheduler, request)
    assert len(plan.chunks[0].drafts) == 4
    scheduler = make_scheduler(num_blocks=11)
    request = make_request("x", max_tokens=6)
    other = make_request("y", max_tokens=6)
    other.cache_salt = "shares nothing"
    for one in (request, other):
        add_trusted(scheduler, one)
    scheduler.commit(scheduler.plan(), [1, 1])  # each has 5 blocks of 4 for its 19 tokens
    first, second = scheduler.plan().chunks
    assert (len(first.drafts), len(second.drafts)) == (4, 1)
    assert scheduler.counters.num_preemptions == 0


@pytest.mark.parametrize("num_waiting", [0, 3, 30])
def test_drafts_leave_those_that_are_admitted_beside_them_their_draws(num_waiting: int) -> None:
    """A step draws no more than a runner has room for, arrivals' first tokens among it."""
    scheduler = make_scheduler(num_blocks=400, max_num_seqs=40)
    drafting = [make_request(str(i)) for i in range(8)]
    for request in drafting:
        add_trusted(scheduler, request)
    while any(len(request.tokens) == 18 for request in drafting):
        plan = scheduler.plan()
        scheduler.commit(plan, [1] * sum(chunk.num_drawn for chunk in plan.chunks))
    for i in range(num_waiting):
        scheduler.add(
            Request(
                request_id=f"short {i}",
                prompt_token_ids=[100 + i],
                sampling=ResolvedSampling(max_tokens=5),
            )
        )
    plan = scheduler.plan()
    num_drafts = sum(len(chunk.drafts) for chunk in plan.chunks)
    assert (num_drafts > 0) == (num_waiting < 24)
    assert len(plan.chunks) == 8 + num_waiting
    assert sum(chunk.num_drawn for chunk in plan.chunks) <= max_draws(40)


def test_a_draft_ends_where_the_answer_must() -> None:
    for max_tokens, num_drafts in ((2, 0), (3, 1), (4, 2), (9, 4)):
        scheduler = make_scheduler()
        add_trusted(scheduler, make_request("x", max_tokens=max_tokens))
        scheduler.commit(scheduler.plan(), [1])
        [chunk] = scheduler.plan().chunks
        assert len(chunk.drafts) == num_drafts
