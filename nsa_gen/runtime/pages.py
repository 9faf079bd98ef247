"""Which sequence owns which pages of a cache: kept on the host, as a step never needs to know more than its table."""

from collections import Counter
from collections.abc import Iterable


class CapacityError(RuntimeError):
    """A cache has no room for the tokens it is to hold; nothing was changed."""


class Pages:
    """Pages of `page_size` tokens, owned by one sequence or shared by several, and those that are free."""

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
        """Pages that no sequence uses."""
        return len(self._free)

    @property
    def sharing(self) -> bool:
        """Whether a page has several users."""
        return self._shared > 0

    def needed(self, growing: Iterable[tuple[int, int, int]]) -> int:
        """Free pages that it takes to let sequences grow: (sequence, tokens held, tokens wanted) of each."""
        pages, tails = 0, Counter()
        for sequence, held, wanted in growing:
            pages += max(0, -(-wanted // self.page_size) - len(self.owned[sequence]))
            tail = self._shared_tail(sequence, held)
            if tail is not None:
                tails[self.owned[sequence][tail]] += 1
        # The last user of a page keeps it.
        return pages + sum(min(count, self._users[page] - 1) for page, count in tails.items())

    def grow(self, sequence: int, held: int, wanted: int) -> tuple[int, int] | None:
        """Own pages for `wanted` tokens, more than are held; returns (source, target) of a page to be copied, or None.

        There must be `needed` free pages.
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
        """Give back the pages beyond the first `tokens` tokens."""
        owned = self.owned[sequence]
        while len(owned) > -(-tokens // self.page_size):
            self._release(owned.pop())
            self._changed.add(sequence)

    def share(self, source: int, target: int, tokens: int) -> None:
        """Let `target`, which has given back its pages, use those of the first `tokens` tokens of `source`."""
        self.owned[target] = self.owned[source][: -(-tokens // self.page_size)]
        for page in self.owned[target]:
            self._users[page] += 1
            self._shared += self._users[page] == 2
        self._changed.add(target)

    def changes(self) -> list[tuple[int, list[int]]]:
        """Rows of the table that differ from what they were at the last call, with their numbers: -1 is no page."""
        rows = [(each, self.owned[each] + [-1] * (self.width - len(self.owned[each]))) for each in self._changed]
        self._changed.clear()
        return rows

    def _shared_tail(self, sequence: int, length: int) -> int | None:
        """Number of the page that the next token goes to, if it holds some already and others use it too."""
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
