r"""Plain text to token ids: split it into words, and merge the bytes of each.

Sennrich et al. 2016, arXiv:1508.07909 (merging); Radford et al. 2019, section 2.2 (bytes).

The rules use \p{L} (letters) and \p{N} (numbers), which `re` does not have. Here they come from the
Unicode tables of Python, so characters of a later version of Unicode may be split differently.
"""

from __future__ import annotations

import heapq
import re
import unicodedata
from collections.abc import Iterable
from functools import cache

from minilora.files.vocabulary import Vocabulary

# White_Space of Unicode; the \s of `re` has \x1c to \x1f as well.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


@cache
def compiled(rule: str) -> re.Pattern[str]:
    """Return the rule for `re`, as a group, so that `split` returns what matches as well."""
    ranges = {r"\s": SPACE, r"\p{L}": _ranges("L"), r"\p{N}": _ranges("N")}

    def in_ranges(match: re.Match[str]) -> str:
        found = match[0] if match[0].startswith("[") else f"[{match[0]}]"
        for name, characters in ranges.items():
            found = found.replace(name, characters)
        return found

    rule = rule.replace(r"\S", r"[^\s]")
    return re.compile("(" + re.sub(r"\[.*?\]|\\p\{.\}|\\s", in_ranges, rule) + ")")


@cache
def _ranges(category: str) -> str:
    """Return all characters of a category as ranges, such as A-Za-z, to be put into brackets."""
    categories = "".join(unicodedata.category(chr(i))[0] for i in range(0x40000))  # none is above
    runs = re.finditer(f"{category}+", categories)
    return "".join(rf"\U{run.start():08x}-\U{run.end() - 1:08x}" for run in runs)


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a group that matches any of the texts, the longest if several begin alike."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


class WordEncoder:
    """Encodes plain text, and keeps the ids of short words, most of which come again."""

    max_words, max_length = 100_000, 50  # that are kept

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.rules = [compiled(rule) for rule in vocabulary.rules]
        self.kept: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. Each rule splits what the rule before it has left."""
        words = [text] if text else []
        for rule in self.rules:
            words = [part for word in words for part in rule.split(word) if part]
        ids: list[int] = []
        for word in words:
            found = self.kept.get(word)
            ids += self._new(word) if found is None else found
        return ids

    def _new(self, word: str) -> list[int]:
        """Return the ids of a word that is not kept."""
        v, data = self.vocabulary, word.encode()
        whole = v.ignore_merges and data in v.ids
        ids = [v.ids[data]] if whole else merge(data, v.ids, v.ranks)
        if len(word) <= self.max_length:
            if len(self.kept) >= self.max_words:
                self.kept.clear()
            self.kept[word] = ids
        return ids


def merge(word: bytes, ids: dict[bytes, int], ranks: dict[tuple[bytes, bytes], int]) -> list[int]:
    """Merge the neighbours of lowest rank, the leftmost first, until no neighbours have a rank.

    A heap holds the pairs, and a linked list the parts, so that n bytes take O(n log n) time. A
    pair stays in the heap when one of its parts is merged with the neighbour on its other side, and
    is recognised when its turn comes. Bytes that are not in `ids` are left out.
    """
    parts = [word[i : i + 1] for i in range(len(word)) if word[i : i + 1] in ids]
    parts.append(b"")  # index -1: the neighbour of the first and of the last part, never merged
    before, after = [*range(-1, len(parts) - 1)], [*range(1, len(parts)), 0]
    pairs = enumerate(zip(parts, parts[1:], strict=False))
    heap = [(ranks[pair], i) for i, pair in pairs if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, left = heapq.heappop(heap)
        right = after[left]
        if ranks.get((parts[left], parts[right])) != rank:
            continue  # one of them has been merged since
        parts[left], parts[right] = parts[left] + parts[right], b""
        after[left] = after[right]
        before[after[left]] = left
        for i in (before[left], left):
            if (new := ranks.get((parts[i], parts[after[i]]))) is not None:
                heapq.heappush(heap, (new, i))
    return [ids[part] for part in parts if part]
