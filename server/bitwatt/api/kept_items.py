"""Items of earlier responses, which a later input may refer to by their ids.

Vercel's `ai` does so with its defaults. Nothing else is kept of a response.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import msgspec

from bitwatt.api.schemas.response_events import OutputItem

__all__ = ["CallerItems", "KeptItems"]


class CallerItems:
    """The latest items of one caller's responses, as far as the bytes go; of one event loop."""

    def __init__(self, max_bytes: int) -> None:
        """Begin without any."""
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._items: OrderedDict[str, bytes] = OrderedDict()

    def keep(self, items: Iterable[OutputItem]) -> None:
        """Keep the items, and give up those that nobody has used for longest."""
        for item in items:
            encoded = msgspec.json.encode(item)
            if len(encoded) <= self._max_bytes:
                self._items[item.id] = encoded
                self._num_bytes += len(encoded)
        while self._num_bytes > self._max_bytes:
            _, encoded = self._items.popitem(last=False)
            self._num_bytes -= len(encoded)

    def find(self, item_id: str) -> dict[str, Any] | None:
        """Return the item as its response had it; None where it isn't kept, or no longer."""
        encoded = self._items.get(item_id)
        if encoded is None:
            return None
        self._items.move_to_end(item_id)
        item: dict[str, Any] = msgspec.json.decode(encoded)
        return item


class KeptItems:
    """The items of every caller, each of whom sees its own alone."""

    def __init__(self, max_bytes: int) -> None:
        """Begin; max_bytes are each caller's."""
        self._max_bytes = max_bytes
        self._callers: dict[bytes | None, CallerItems] = {}

    def of(self, caller: bytes | None) -> CallerItems:
        """Return a caller's; it is a key's digest, or None where no key is needed."""
        return self._callers.setdefault(caller, CallerItems(self._max_bytes))
