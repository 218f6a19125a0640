"""The scheduler: which tokens of which requests the next step computes. No torch, no clock.

There is no prefill phase and no decode phase. Every request has tokens, some of them computed;
a step brings each closer to having all computed, running requests first, under one budget of
tokens. Whoever has all its tokens computed samples the next one.

Requests come in the order of priority, then of arrival, with one exception: of a step's budget a
long prompt leaves a quarter to short ones that wait behind it, so that they wait some steps and not
for every prompt that came before. Three quarters are enough for the first in order never to starve.
A lower priority never costs a higher one: its prompts leave room for those that wait, and its
requests are preempted where one that waits lacks a row or blocks.

Steps may overlap: plan() may be called while the step before still runs. The token that a running
step will sample is *pending*: the plan has a place for it, and the device, which runs steps in
order, fills it in. Blocks enter the prefix cache when their computation is planned, not when it is
done: a request that shares them reads them in the same step or a later one, after they are written.

Where the scheduler speculates, a request whose next tokens can be guessed gets a step that computes
them all, as *drafts*, and samples behind each: what it samples is kept up to the first that is not
the draft. The step must know all it computes, and the next one how many tokens it brought: no step
is planned while the running one decides what is drafted. Drafts take what rows and blocks are left,
and drive nobody out.

A request may want the log-probabilities of its prompt: what each token's logits say of the next.
A block from the prefix cache has keys and values and no logits, so such a request shares none but
those that it has scored before it was preempted.

A request may want its prompt *embedded*: the hidden state of its last token. That one is computed
in any case, so that such a request shares blocks as others do. It draws nothing.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from operator import eq

from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.drafting import Drafter, StepCost
from bitwatt.scheduling.plan import MAX_VERIFYING_DRAWS, Chunk, Committed, Plan, ScoredSpan
from bitwatt.scheduling.request import FinishReason, Request

_Queue = list[tuple[tuple[int, int], Request]]
_PARTS_OF_BUDGET = 4  # one of them is short prompts'

__all__ = ["Counters", "RequestTooLongError", "Scheduler"]


class RequestTooLongError(ValueError):
    """The request can never fit; the message has the numbers and the knob."""


@dataclass(slots=True)
class Counters:
    """Totals since the start, in tokens unless named otherwise."""

    num_generation_tokens: int = 0
    num_preemptions: int = 0  # requests
    num_drafts: int = 0  # verifications
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0  # of those
    num_prefix_cache_queries: int = 0
    num_prefix_cache_hits: int = 0


class Scheduler:
    """Admits, advances, preempts and ends requests.

    Call order: add and abort at any time; plan, then commit (or give_up) of the same plan, at most
    one other plan between the two. A request is in exactly one of waiting, running or finished.
    """

    def __init__(
        self,
        blocks: BlockAllocator,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        speculates: bool = False,
    ) -> None:
        assert max_num_seqs <= max_num_batched_tokens, "every running request advances in a step"
        self.blocks = blocks
        self._block_size = blocks.block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.speculates = speculates
        self._step_cost = StepCost()
        self.counters = Counters()
        self._requests: dict[str, Request] = {}
        self._order: dict[str, tuple[int, int]] = {}  # (priority, arrival), smaller first
        self._arrivals = count()
        # Heaps by that order, of requests that wait, and maybe of some that don't any more.
        self._waiting: _Queue = []
        self._short: _Queue = []  # those of them whose tokens fit into _short_budget
        self._short_budget = max_num_batched_tokens // _PARTS_OF_BUDGET
        self._num_waiting = 0
        self._running: list[Request] = []  # in order
        self._free_rows = list(reversed(range(max_num_seqs)))
        self._unscored: set[Request] = set()  # those of _requests whose is_scored is False

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises  RequestTooLongError if it could never run to its end
        """
        assert request.prompt_token_ids, "a prompt has at least one token"
        assert request.sampling.max_tokens > 0 or not request.is_scored, "it asks for something"
        if request.sampling.embeds:
            assert request.sampling.max_tokens == 0
            assert request.sampling.prompt_logprobs is None
        if request.max_len > self.max_model_len:
            raise RequestTooLongError(
                f"prompt has {len(request.prompt_token_ids)} tokens and max_tokens is "
                f"{request.sampling.max_tokens}; together they may be {self.max_model_len} "
                "(--max-model-len)"
            )
        num_blocks = self._num_blocks_for(request.num_needed)
        if num_blocks > self.blocks.num_blocks:
            raise RequestTooLongError(
                f"the request needs {num_blocks} KV-cache blocks; there are "
                f"{self.blocks.num_blocks} (--kv-cache-bytes)"
            )
        if self.speculates:
            request.drafter = Drafter(request.tokens)
        self._requests[request.request_id] = request
        if not request.is_scored:
            self._unscored.add(request)
        self._order[request.request_id] = (request.priority, next(self._arrivals))
        self._wait(request)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> Request | None:
        """End a request at any moment; returns it, or None if it has already ended."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, reason)
        return request

    def plan(self) -> Plan:
        """Return the next step's work and count it as planned; empty if there is none.

        It is empty, too, while the running step decides what a request drafts next: what runs
        beside it would otherwise go in steps of its own, each of which reads all weights.
        """
        if self._waiting:
            self._make_room()
        if self.speculates and any(map(self._waits_to_draft, self._running)):
            return Plan([], 0)
        chunks: list[Chunk] = []
        budget = self.max_num_batched_tokens
        is_full = False
        running = self._running
        num_admissible = min(self._num_waiting, self.max_num_seqs - len(running))
        num_drafts_left = MAX_VERIFYING_DRAWS - len(running) - num_admissible
        size = self._block_size
        i = 0
        while i < len(running) and budget:
            request = running[i]
            num_tokens = len(request.tokens) + request.num_pending - request.num_planned
            if num_tokens == 0 or request.num_planned == request.num_needed:
                # All it needs is planned. Its last token ends it: no step computes that one.
                i += 1
                continue
            drafts: Sequence[int] = ()
            if request.drafter is not None and num_tokens == 1 and not request.num_pending:
                left = min(num_drafts_left, budget - (len(running) - i))
                drafts = self._draft(request, left)
                num_drafts_left -= len(drafts)
            if num_tokens > 1:
                # A long prompt leaves each request behind it a token, so that none stalls for it.
                left = len(running) - i - 1 + self._left_to_waiting(request)
                num_needed = request.num_needed - request.num_planned
                num_tokens = min(num_tokens, num_needed, max(1, budget - left))
            end = request.num_planned + num_tokens
            while end > len(request.blocks) * size and not self._grow(request, end):
                is_full = True
                victim = running[-1]
                self._preempt(victim)
                if victim is request:
                    break
            else:
                chunks.append(self._advance(request, num_tokens, drafts))
                budget -= num_tokens + len(drafts)
                i += 1
        while budget and not is_full and len(self._running) < self.max_num_seqs:
            chunk = self._admit_next(budget)
            if chunk is None:
                break
            chunks.append(chunk)
            budget -= chunk.num_tokens
        num_planned = self.max_num_batched_tokens - budget
        if not self._unscored:
            return Plan(chunks, num_planned)
        return Plan(chunks, num_planned, *self._plan_scores(chunks))

    def commit(self, plan: Plan, tokens: Sequence[int | None]) -> list[Committed]:
        """Take the tokens a step sampled, as many a chunk as it draws, in the plan's order.

        Of what follows drafts, tokens are kept up to the first that is not the draft.

        None ends its request with FinishReason.ERROR, and the prefix cache forgets its tokens: what
        was computed of them may be why.
        """
        committed: list[Committed] = []
        num_kept = end = 0
        for chunk in plan.chunks:
            if not chunk.samples:
                continue
            start, end = end, end + 1 + len(chunk.drafts)
            request = chunk.request
            request.num_pending -= 1
            request.num_drafted = 0
            if request.finish_reason is not None:
                continue  # it ended while the step ran
            kept, reason = _kept(request, chunk.drafts, tokens[start:end])
            request.tokens += kept
            num_kept += len(kept)
            if chunk.drafts:
                self._count_drafts(request, chunk.drafts, kept)
            if reason is FinishReason.ERROR:
                self.fail(request)
            elif reason is not None:
                self._finish(request, reason)
            committed.append(Committed(request, kept, reason, start))
        assert end == len(tokens), "a token of no chunk"
        self.counters.num_generation_tokens += num_kept
        return committed

    def fail(self, request: Request) -> None:
        """End a request that can't go on; the prefix cache forgets its tokens."""
        self.blocks.forget(request.tokens, request.cache_salt)
        self._finish(request, FinishReason.ERROR)

    def give_up(self, failed: Plan, later: Plan | None) -> list[Request]:
        """End the requests of a step that failed, in place of its commit; return those.

        later  the step that was planned on top of it, if one was; its results are not to be used

        All others are preempted, to be computed again, and the prefix cache is emptied: blocks may
        be known for contents that were planned and never written.
        """
        for plan in (failed, later):
            for chunk in plan.chunks if plan is not None else ():
                chunk.request.num_pending -= chunk.samples
                chunk.request.num_drafted = 0
            for span in plan.scored if plan is not None else ():
                self._unscore(span.request, span.start)
            for chunk in plan.embedded if plan is not None else ():
                self._unscore(chunk.request, len(chunk.request.prompt_token_ids) - 1)
        ended = [c.request for c in failed.chunks if c.request.finish_reason is None]
        for request in ended:
            self._finish(request, FinishReason.ERROR)
        while self._running:
            self._preempt(self._running[-1])
        self.blocks.forget_all()
        return ended

    def check_integrity(self) -> None:
        """Raise AssertionError unless every request, row and block is accounted for."""
        for request in self._requests.values():
            assert request.finish_reason is None
            assert (request.row is not None) == (request in self._running)
            assert len(request.blocks) >= self._num_blocks_for(request.num_planned)
            assert request.num_pending or not request.num_drafted
            assert request.is_scored == (request not in self._unscored)
        rows = [r.row for r in self._running if r.row is not None] + self._free_rows
        assert sorted(rows) == list(range(self.max_num_seqs)), "a row is lost"
        assert self._num_waiting + len(self._running) == len(self._requests)
        assert self._unscored <= set(self._requests.values())
        self.blocks.check_integrity([r.blocks for r in self._requests.values()])

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Give the request blocks for so many tokens; return False, and none, if they lack."""
        missing = self._num_blocks_for(num_tokens) - len(request.blocks)
        if missing > self.blocks.num_free:
            return False
        request.blocks.extend(self.blocks.allocate() for _ in range(missing))
        return True

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Take in what a step has taken, for drafts to be worth their rows."""
        if self.speculates and num_tokens <= MAX_VERIFYING_DRAWS:
            self._step_cost.observe(num_tokens, seconds)

    def _waits_to_draft(self, request: Request) -> bool:
        """Whether the running step tells the tokens that the request's next draft goes by."""
        if request.num_drafted:
            return True
        num_tokens = len(request.tokens) + request.num_pending - request.num_planned
        can_go_on = num_tokens == 1 and request.num_planned < request.num_needed
        return can_go_on and request.num_pending > 0 and self._num_drafts(request) > 0

    def _num_drafts(self, request: Request) -> int:
        """Return how many drafts behind its next token are worthwhile and of use."""
        if request.drafter is None:
            return 0
        num_worthwhile = request.drafter.num_worthwhile(
            num_running=len(self._running), free_rows=self._step_cost.free_rows
        )
        # Behind each of them, and behind all, a token is drawn.
        num_useful = request.max_len - len(request.tokens) - request.num_pending - 1
        return min(num_worthwhile, num_useful)

    def _draft(self, request: Request, limit: int) -> Sequence[int]:
        """Return drafts behind the request's last token, which is known, with blocks for them."""
        num_held = (len(request.blocks) + self.blocks.num_free) * self._block_size
        limit = min(limit - self._left_to_waiting(request), num_held - len(request.tokens))
        count = min(limit, self._num_drafts(request))
        if count < 1:
            return ()
        assert request.drafter is not None
        drafts = request.drafter.draft(count)
        can_hold = self._grow(request, len(request.tokens) + len(drafts))
        assert can_hold, "room was counted above"
        return drafts

    def _count_drafts(self, request: Request, drafts: Sequence[int], kept: Sequence[int]) -> None:
        num_accepted = sum(map(eq, drafts, kept))
        if request.row is not None:  # else it was preempted, and has nothing computed
            request.num_planned += num_accepted
        self.counters.num_drafts += 1
        self.counters.num_draft_tokens += len(drafts)
        self.counters.num_accepted_tokens += num_accepted

    def _advance(self, request: Request, num_tokens: int, drafts: Sequence[int] = ()) -> Chunk:
        """Return the chunk of its next tokens; drafts, behind them, don't count as computed."""
        assert request.row is not None
        start = request.num_planned
        end = request.num_planned = start + num_tokens
        num_known = len(request.tokens)
        samples = end == num_known + request.num_pending and end < request.max_len
        if samples:
            request.num_pending += 1
            request.num_drafted = len(drafts)
        num_computed = end if end < num_known else num_known
        if num_computed >= (len(request.prefixes) + 1) * self._block_size:
            self._offer_full_blocks(request)
        first_new_block = request.num_sent_blocks
        new_blocks: Sequence[int] = ()
        if len(request.blocks) > first_new_block:
            new_blocks = request.blocks[first_new_block:]
            request.num_sent_blocks = len(request.blocks)
        return Chunk(
            request,
            request.row,
            start,
            num_tokens + len(drafts),
            end > num_known,
            samples,
            first_new_block,
            new_blocks,
            drafts,
        )

    def _plan_scores(self, chunks: Sequence[Chunk]) -> tuple[list[ScoredSpan], list[Chunk]]:
        """Return what the chunks score, and those whose last token's hidden state is wanted."""
        spans: list[ScoredSpan] = []
        embedded: list[Chunk] = []
        for chunk in chunks:
            request = chunk.request
            if request not in self._unscored:
                continue
            # What it computes again after a preemption has been scored.
            end = min(chunk.start + chunk.num_tokens, request.num_to_score)
            if request.num_scored < end:
                if request.sampling.embeds:
                    embedded.append(chunk)
                else:
                    spans.append(ScoredSpan(chunk, request.num_scored, end))
                request.num_scored = end
                if request.is_scored:
                    self._unscored.discard(request)
        return spans, embedded

    def _unscore(self, request: Request, num_scored: int) -> None:
        """Take back what a step that failed was to score behind so many tokens."""
        if request.finish_reason is None:
            request.num_scored = min(request.num_scored, num_scored)
            self._unscored.add(request)

    def _offer_full_blocks(self, request: Request) -> None:
        if not self.blocks.prefix_caching:
            return
        size = self.blocks.block_size
        prefixes = request.prefixes
        num_full = min(request.num_planned, len(request.tokens)) // size
        while len(prefixes) < num_full:
            i = len(prefixes)
            before = prefixes[-1] if prefixes else request.cache_salt
            content = tuple(request.tokens[i * size : (i + 1) * size])
            prefixes.append(self.blocks.register(request.blocks[i], before, content))

    def _make_room(self) -> None:
        """Preempt requests of lower priority than the first that waits, while it can't run."""
        first = _first(self._waiting)
        while (
            first is not None
            and self._running
            and self._running[-1].priority > first.priority
            and (
                len(self._running) == self.max_num_seqs
                or self._num_blocks_for(len(first.tokens)) > self.blocks.num_free
            )
        ):
            self._preempt(self._running[-1])

    def _left_to_waiting(self, request: Request) -> int:
        """Return how many of a step's tokens the request's prompt leaves to those that wait."""
        if not self._waiting or len(self._running) == self.max_num_seqs:
            return 0
        num_short = num_sooner = 0
        for (priority, _), other in self._short:
            if num_short >= self._short_budget:
                break
            if (
                priority == request.priority
                and other.is_waiting
                and self._num_blocks_for(len(other.tokens)) <= self.blocks.num_free
            ):
                num_short += len(other.tokens)
        if self._waiting[0][0][0] < request.priority:
            for (priority, _), other in self._waiting:
                if num_sooner >= self.max_num_batched_tokens:
                    break
                if priority < request.priority and other.is_waiting:
                    num_sooner += len(other.tokens)
        return min(num_short, self._short_budget) + num_sooner

    def _admit_next(self, budget: int) -> Chunk | None:
        request = _first(self._waiting)
        if request is None:
            return None
        if len(request.tokens) <= self._short_budget:
            return self._admit(request, budget)
        left = self._left_to_waiting(request)
        if budget > left:
            return self._admit(request, budget - left)
        # Behind it, and whole: what is left of one that runs has no claim to this share.
        short = _first(self._short)
        if short is None or short.priority > request.priority or len(short.tokens) > budget:
            return None
        return self._admit(short, budget)

    def _admit(self, request: Request, budget: int) -> Chunk | None:
        if request.num_pending or request.num_scored == request.num_needed:
            return None  # preempted while a step runs: its next token, or its end, is not known yet
        shared, prefixes = self.blocks.match(request.tokens, request.cache_salt)
        if not request.is_scored:
            num_scored_blocks = request.num_scored // self._block_size
            shared, prefixes = shared[:num_scored_blocks], prefixes[:num_scored_blocks]
        num_tokens = min(len(request.tokens), request.num_needed)
        needed = self._num_blocks_for(num_tokens) - len(shared)
        if needed > self.blocks.num_free - sum(map(self.blocks.is_free, shared)):
            return None
        self._num_waiting -= 1
        for block in shared:
            self.blocks.share(block)
        request.blocks = shared
        request.prefixes = prefixes
        request.num_planned = len(shared) * self.blocks.block_size
        request.row = self._free_rows.pop()
        self._running.append(request)
        self._running.sort(key=lambda r: self._order[r.request_id])
        self._count_admission(request)
        num_tokens = min(num_tokens - request.num_planned, budget)
        can_hold = self._grow(request, request.num_planned + num_tokens)
        assert can_hold, "room was counted above"
        return self._advance(request, num_tokens)

    def _count_admission(self, request: Request) -> None:
        if request.num_cached_tokens is not None:
            return  # it was preempted: its prompt has been counted
        request.num_cached_tokens = request.num_planned
        if self.blocks.prefix_caching and (request.is_scored or request.sampling.embeds):
            self.counters.num_prefix_cache_queries += len(request.prompt_token_ids)
            self.counters.num_prefix_cache_hits += request.num_planned

    def _wait(self, request: Request) -> None:
        entry = (self._order[request.request_id], request)
        heapq.heappush(self._waiting, entry)
        if len(request.tokens) <= self._short_budget:
            _first(self._short)  # drops those that came before and run: nothing else may ask
            heapq.heappush(self._short, entry)
        self._num_waiting += 1

    def _stop_running(self, request: Request) -> None:
        self._running.remove(request)
        assert request.row is not None
        self._free_rows.append(request.row)
        request.row = None
        self.blocks.free(request.blocks)
        request.blocks = []
        request.num_sent_blocks = 0
        request.prefixes = []

    def _preempt(self, request: Request) -> None:
        self._stop_running(request)
        request.num_planned = 0
        request.num_preemptions += 1
        self.counters.num_preemptions += 1
        self._wait(request)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        if request.row is not None:
            self._stop_running(request)
        else:
            self._num_waiting -= 1
        del self._requests[request.request_id]
        self._unscored.discard(request)
        del self._order[request.request_id]


def _kept(
    request: Request, drafts: Sequence[int], drawn: Sequence[int | None]
) -> tuple[list[int], FinishReason | None]:
    """Return the tokens that the request gets of those drawn, and why it ends by them."""
    kept: list[int] = []
    num_left = request.max_len - len(request.tokens)
    for i, token in enumerate(drawn):
        if token is None:
            return kept, FinishReason.ERROR
        kept.append(token)
        if token in request.sampling.stop_token_ids:
            return kept, FinishReason.STOP
        if len(kept) >= num_left:
            return kept, FinishReason.LENGTH
        if i < len(drafts) and token != drafts[i]:
            break
    return kept, None


def _first(queue: _Queue) -> Request | None:
    """Return the first request of the queue that waits, those before it dropped."""
    while queue and not queue[0][1].is_waiting:
        heapq.heappop(queue)
    return queue[0][1] if queue else None
