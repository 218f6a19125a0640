"""How a fleet's requests find a replica: in turns, by two choices, by their prompts' beginnings."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from bitwatt.simulation.traffic import Arrival

__all__ = ["Look", "PrefixAffine", "RoundRobin", "Router", "TwoChoices", "new_routers"]

Look = Callable[[int], int | None]
"""Returns how many requests a replica has open; None where it is down."""

_MOST_LOOKS = 4  # of replicas that are up, by one request


class Router(Protocol):
    """Chooses a replica for each request."""

    name: str

    def choose(self, arrival: Arrival, look: Look, /) -> int | None:
        """Return the replica's index; None where none is up."""
        ...


class RoundRobin:
    """Each replica that is up in turn."""

    name = "round robin"

    def __init__(self, num_replicas: int) -> None:
        """Begin with the first."""
        self._num_replicas = num_replicas
        self._next = 0

    def choose(self, _: Arrival, look: Look, /) -> int | None:
        """Return the next that is up."""
        for _turn in range(self._num_replicas):
            index, self._next = self._next, (self._next + 1) % self._num_replicas
            if look(index) is not None:
                return index
        return None


class TwoChoices:
    """The one with fewer open requests of two drawn at random, as Ray Serve has it."""

    name = "two choices"

    def __init__(self, num_replicas: int, *, seed: int = 0) -> None:
        """Draw by the seed."""
        self._num_replicas = num_replicas
        self._chance = random.Random(f"router {seed}")

    def choose(self, _: Arrival, look: Look, /) -> int | None:
        """Return the less loaded of two that are up."""
        starts = [self._chance.randrange(self._num_replicas) for _ in range(2)]
        found = [i for s in starts for i in _up_from(s, self._num_replicas, look, 1)]
        return _least_open(found, look)


class PrefixAffine:
    """A beginning's own replica by its hash, or where that one is crowded the next on the ring.

    A replica with max_open open requests is crowded. Where four in a row are, two choices decide:
    else the one beginning that everybody sends would be four replicas' alone.
    """

    name = "prefix affine"

    def __init__(self, num_replicas: int, *, max_open: int, seed: int = 0) -> None:
        """Begin; the seed says where on the ring a beginning lies."""
        self._num_replicas = num_replicas
        self._max_open = max_open
        self._seed = seed
        self._elsewhere = TwoChoices(num_replicas, seed=seed)

    def choose(self, arrival: Arrival, look: Look, /) -> int | None:
        """Return the replica."""
        home = random.Random(f"{self._seed} {arrival.prefix}").randrange(self._num_replicas)
        for index in _up_from(home, self._num_replicas, look, _MOST_LOOKS):
            if (look(index) or 0) < self._max_open:
                return index
        return self._elsewhere.choose(arrival, look)


def new_routers(num_replicas: int, *, max_open: int, seed: int = 0) -> list[Router]:
    """Return one of each; max_open is PrefixAffine's."""
    return [
        RoundRobin(num_replicas),
        TwoChoices(num_replicas, seed=seed),
        PrefixAffine(num_replicas, max_open=max_open, seed=seed),
    ]


def _up_from(start: int, num_replicas: int, look: Look, most: int) -> Iterator[int]:
    """Yield the first replicas on the ring from start on that are up, so many at most."""
    num_found = 0
    for step in range(num_replicas):
        index = (start + step) % num_replicas
        if look(index) is not None:
            yield index
            num_found += 1
            if num_found == most:
                return


def _least_open(indices: Sequence[int], look: Look) -> int | None:
    return min(indices, key=lambda index: look(index) or 0, default=None)
