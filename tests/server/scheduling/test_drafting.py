"""Drafts: what is guessed of a request's next tokens, when, and how the scheduler plans it."""

import random

from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.drafting import MAX_DRAFT_TOKENS, Drafter
from bitwatt.scheduling.plan import Plan
from bitwatt.scheduling.request import Request, ResolvedSampling
from bitwatt.scheduling.scheduler import Scheduler
from hypothesis import given
from hypothesis import strategies as st

TEXT = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]


def test_what_followed_the_last_three_tokens_is_drafted() -> None:
    drafter = Drafter([*TEXT, 99, 12, 13, 14])
    assert drafter.is_promising
    assert drafter.draft(15) == [15, 16, 17, 18]
    assert drafter.draft(2) == [15, 16]


def test_nothing_is_drafted_where_nothing_repeats() -> None:
    for tokens in ([1], [1, 2], [1, 2, 3], TEXT, [*TEXT, 12, 13]):
        drafter = Drafter(list(tokens))
        assert not drafter.is_promising
        assert drafter.draft(15) == ()


def test_the_longer_the_match_the_longer_the_draft() -> None:
    source = list(range(100, 160))
    tokens = [*source, 100, 101, 102]
    drafter = Drafter(tokens)
    lengths = []
    for token in source[3:40]:
        lengths.append(len(drafter.draft(50)))
        tokens.append(token)
    assert lengths == sorted(lengths)
    assert lengths[0] == 4
    assert lengths[-1] == MAX_DRAFT_TOKENS


def test_a_draft_that_comes_to_the_end_goes_on_with_itself() -> None:
    tokens = [7, 1, 2, 1, 2, 1, 2]
    assert Drafter(tokens).draft(15) == [1, 2, 1, 2]
    assert Drafter([5] * 30).draft(15) == [5] * 4  # three tokens have agreed since it looked


def test_a_single_edit_in_a_long_match_is_passed_over() -> None:
    source = list(range(100, 160))
    tokens = [*source, *source[:3]]
    drafter = Drafter(tokens)
    for token in source[3:20]:
        assert drafter.is_promising
        tokens.append(token)
    assert drafter.draft(3) == source[20:23]
    tokens.append(7)  # in place of the next
    assert drafter.draft(3) == source[21:24]
    tokens.append(8)  # and of one more: now it must be found again
    assert not drafter.is_promising
    tokens += source[30:33]
    assert drafter.draft(3) == source[33:36]


def test_who_drafts_in_vain_soon_drafts_no_more_until_a_long_match_comes() -> None:
    chance = random.Random(0)
    tokens = [1, 2, 3]
    drafter = Drafter(tokens)
    drafter.draft(1)
    num_verified = 0
    for _ in range(200):  # three tokens, again and again, and each time something else behind them
        tokens += [chance.randrange(10, 10_000), 1, 2, 3]
        if drafts := drafter.draft(15):
            drafter.book(len(drafts), 0)
            num_verified += 1
    assert 1 <= num_verified <= 3
    source = [chance.randrange(10, 10_000) for _ in range(40)]
    tokens += source
    num_matched = 0
    while not drafter.is_promising:
        tokens.append(source[num_matched])
        num_matched += 1
    assert 3 < num_matched < 20


@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.data())
def test_a_draft_is_within_its_limit_and_made_of_known_tokens(
    tokens: list[int], data: st.DataObject
) -> None:
    """However the tokens come: one by one or many at once."""
    known = tokens[:1]
    drafter = Drafter(known)
    while len(known) < len(tokens):
        limit = data.draw(st.integers(1, 20))
        drafts = drafter.draft(limit)
        assert len(drafts) <= min(limit, MAX_DRAFT_TOKENS)
        assert set(drafts) <= set(known)
        assert bool(drafts) == drafter.is_promising
        known += tokens[len(known) : len(known) + data.draw(st.integers(1, 5))]


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
    scheduler.add(request)
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
    scheduler.add(request)
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
    scheduler.add(request)
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
    scheduler.add(request)
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


def test_drafts_planned_behind_a_step_that_failed_are_forgotten() -> None:
    scheduler = make_scheduler()
    request = make_request("x")
    scheduler.add(request)
    plan = begin_to_verify(scheduler, request)
    scheduler.add(make_request("y"))
    failing = scheduler.plan()
    assert [chunk.request.request_id for chunk in failing.chunks] == ["y"]
    scheduler.commit(plan, [*plan.chunks[0].drafts, 6])
    later = scheduler.plan()
    assert [chunk.request.request_id for chunk in later.chunks if chunk.drafts] == ["x"]
    [ended] = scheduler.give_up(failing, later)
    assert ended.request_id == "y"
    scheduler.check_integrity()
    [chunk] = scheduler.plan().chunks
    assert chunk.request is request
    assert chunk.start + chunk.num_tokens == len(request.tokens)


def test_drafts_take_no_block_that_is_not_there_and_preempt_nobody() -> None:
    scheduler = make_scheduler(num_blocks=6)
    request = make_request("x", max_tokens=6)
    scheduler.add(request)
    plan = begin_to_verify(scheduler, request)
    assert len(plan.chunks[0].drafts) == 4
    scheduler = make_scheduler(num_blocks=11)
    request = make_request("x", max_tokens=6)
    other = make_request("y", max_tokens=6)
    other.cache_salt = "shares nothing"
    for one in (request, other):
        scheduler.add(one)
    scheduler.commit(scheduler.plan(), [1, 1])  # each has 5 blocks of 4 for its 19 tokens
    first, second = scheduler.plan().chunks
    assert (len(first.drafts), len(second.drafts)) == (4, 1)
    assert scheduler.counters.num_preemptions == 0


def test_a_draft_ends_where_the_answer_must() -> None:
    for max_tokens, num_drafts in ((2, 0), (3, 1), (4, 2), (9, 4)):
        scheduler = make_scheduler()
        scheduler.add(make_request("x", max_tokens=max_tokens))
        scheduler.commit(scheduler.plan(), [1])
        [chunk] = scheduler.plan().chunks
        assert len(chunk.drafts) == num_drafts
