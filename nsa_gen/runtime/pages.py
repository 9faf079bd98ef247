"""Which sequence owns which pages of a cache. This is kept on the host; kernels need only the page table."""

from collections import Counter
from collections.abc import Iterable


class CapacityError(RuntimeError):
    """A cache has no room for more tokens; nothing was changed."""


class Pages:
    """Pages of `page_size` tokens: each is owned by one sequence, shared by several, or free."""

    def __init__(self, batch: int, page_size: int, pages: int, width: int) -> None:
        self.page_size = page_size
        self.width = width
        self.owned: list[list[int]] = [[] for _ in range(batch)]
        self._users = [0] * pages
        self._shared = 0
        self._changed: set[int] = set()
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Number of pages that no sequence uses."""
        return len(self._free)

    @property
    def sharing(self) -> bool:
        """Whether any page is used by several sequences."""
        return self._shared > 0

    def needed(self, growing: Iterable[tuple[int, int, int]]) -> int:
        """Number of free pages that sequences need to grow: (sequence, tokens held, tokens wanted) of each."""
        pages, tails = 0, Counter()
        for sequence, held, wanted in growing:
            pages += max(0, -(-wanted // self.page_size) - len(self.owned[sequence]))
            tail = self._shared_tail(sequence, held)
            if tail is not None:
                tails[self.owned[sequence][tail]] += 1
        # The last user of a shared page keeps it and needs no copy.
        return pages + sum(min(count, self._users[page] - 1) for page, count in tails.items())

    def grow(self, sequence: int, held: int, wanted: int) -> tuple[int, int] | None:
        """Give a sequence pages for `wanted` tokens, which must be more than `held`.

        Returns (source, target) if a shared page must be copied, else None. There must be `needed` free pages.
        """
        owned, copied = self.owned[sequence], None
        tail = self._shared_tail(sequence, held)
        if tail is not None:
            page = self._take()
            copied = (owned[tail], page)
            self._release(owned[tail])
            owned[tail] = page
            self._changed.add(sequence)
        while len(owned) * self.page_size < wanted:
            owned.append(self._take())
            self._changed.add(sequence)
        return copied

    def shrink(self, sequence: int, tokens: int) -> None:
        """Free the sequence's pages beyond its first `tokens` tokens."""
        owned = self.owned[sequence]
        while len(owned) > -(-tokens // self.page_size):
            self._release(owned.pop())
            self._changed.add(sequence)

    def share(self, source: int, target: int, tokens: int) -> None:
        """Let `target`, which must own no pages, share the pages of the first `tokens` tokens of `source`."""
        self.owned[target] = self.owned[source][: -(-tokens // self.page_size)]
        for page in self.owned[target]:
            self._users[page] += 1
            self._shared += self._users[page] == 2
        self._changed.add(target)

    def changes(self) -> list[tuple[int, list[int]]]:
        """(sequence, page numbers) for each row of the table that changed since the last call; -1 means no page."""
        rows = [(each, self.owned[each] + [-1] * (self.width - len(self.owned[each]))) for each in self._changed]
        self._changed.clear()
        return rows

    def _shared_tail(self, sequence: int, length: int) -> int | None:
        """Index in `owned` of the page for the next token, if that page holds tokens and is shared; else None."""
        number = length // self.page_size
        owned = self.owned[sequence]
        if length % self.page_size == 0 or number >= len(owned) or self._users[owned[number]] == 1:
            return None
        return number

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _release(self, page: int) -> None:
        self._users[page] -= 1
        self._shared -= self._users[page] == 1
        if self._users[page] == 0:
            self._free.append(page)
