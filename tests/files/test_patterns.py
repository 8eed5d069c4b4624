"""The matcher of patterns from strangers gives what `re` gives, in bounded time."""

import random
import re
import time

import pytest

from minilora.files import patterns
from minilora.files.patterns import PatternError, bounded, ends
from minilora.files.peft_config import by_pattern, targeted
from minilora.nn.validate import CheckpointError

LAYERS = [f"model.{part}.layers.{i}.{block}.{proj}" for part in ("language_model", "visual")
          for i in (0, 1, 12) for block, proj in (("self_attn", "q_proj"), ("self_attn", "v_proj"),
                                                  ("self_attn", "k_proj"), ("mlp", "up_proj"))]
LAYERS += ["model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.o_proj", "lm_head",
           "h.0.attn.c_attn", "q_proj", "base.q_proj\n"]
REAL = [
    r".*\.(q|v)_proj", r"^(?!.*visual).*(?:q_proj|v_proj).*",
    r"model\.layers\.\d+\.self_attn\.(q|v)_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj)).*?",
    r".*layers\.(?:[02]|1\d)\.(?:self_attn|mlp)\.\w+_proj$", r"(?!.*lm_head).*", "q_proj",
    r"(?P<where>model|base).*", r"[a-z.]+\d{1,2}[^0-9]*", r".*(?<=self_attn\.)[qk]_proj",
    r"(?:model\.)?(?:\w+\.)*q_proj",
]
HOSTILE = ["((a+))+X", "(a|aa)+X", "(.|..)+X", "(a*)*X", "([a-z_.0-9]+)+!", "(.*)*x",
           "(a*)(a*)(a*)(a*)(a*)(a*)X", "(a|a)" * 60 + "X", "(?:a?){60}X", "(?=(a+)+X)",
           "((a?)*)*X", "(a{0,60}){0,60}X", "(?<!b)(a+a+)+X", "(.*.*.*.*)*X",
           "(a{1,50000}){1,50000}X"]


@pytest.mark.parametrize("pattern", REAL)
def test_patterns_of_real_adapters(pattern):
    config = {"target_modules": pattern, "modules_to_save": []}
    assert [n for n in LAYERS if targeted(config, n)] == [
        n for n in LAYERS if re.fullmatch(pattern, n)]
    assert [by_pattern({pattern: 1}, n, 0) for n in LAYERS] == [
        int(re.match(rf"(.*\.)?({pattern})$", n) is not None) for n in LAYERS]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_no_pattern_takes_long(pattern):
    began = time.monotonic()
    for text in ("a" * 60, "a" * 200, "a." * 100):
        try:
            assert len(text) not in ends(pattern, text) or not pattern.endswith("X")
        except PatternError:
            pass  # too much work
    assert time.monotonic() - began < 60  # `re` would take years


def test_many_matches_share_one_bound(monkeypatch):
    monkeypatch.setattr(patterns, "MAX_STEPS", 2000)
    with bounded():
        monkeypatch.undo()
        assert ends("a*", "a" * 20) == list(range(20, -1, -1))
        with pytest.raises(CheckpointError, match="too much work"):
            for _ in range(100):
                ends("a*", "a" * 20)
    assert ends("a*", "aa") == [2, 1, 0]


@pytest.mark.parametrize("pattern, words", [
    ("(", "no regular expression"), ("a{2,1}", "no regular expression"),
    (r"(a)\1", "refers to a group"), (r"(?P<x>a)(?P=x)", "not supported"),
    ("(?i)a", "not supported"), ("(?i:a)", "not supported"), ("(?>a)", "not supported"),
    ("a*+", "possessive"), ("(a)(?(1)b)", "not supported"), ("(?#x)a", "not supported"),
    ("(" * 60 + ")" * 60, "more than 50 groups"), ("a" * 30_000, "more than 20000 characters"),
])
def test_what_is_not_supported_is_refused(pattern, words):
    with pytest.raises(PatternError, match=words):
        ends(pattern, "a")


def test_50_groups_inside_each_other_are_allowed():
    assert ends("(" * 50 + "a" + ")" * 50, "a") == [1]
    with pytest.raises(PatternError, match="more than 50 groups"):
        ends("(" * 51 + "a" + ")" * 51, "a")


ATOMS = ["a", "b", "ab", ".", r"\.", "[ab]", "[^a]", r"\d", r"\w", "0", "[a-]", "[]a]", r"[\]b]",
         "{", r"\x61", r"\u0062", "^", "$", r"\b", r"\B", r"\A", r"\Z", "(?<=a)", "(?<!ab)"]
COUNTS = ["*", "+", "?", "{2}", "{1,2}", "{,2}", "{2,}", "{0,3}", "{}", "{a}", "{,}"]


def random_pattern(rng, depth=3):
    def atom():
        if depth and rng.random() < 0.3:
            kind = rng.choice(["(", "(?:", "(?=", "(?!", f"(?P<g{rng.randrange(10**9)}>"])
            return kind + random_pattern(rng, depth - 1) + ")"
        return rng.choice(ATOMS)

    def part():
        return atom() + (rng.choice(COUNTS) + rng.choice(["", "?"]) if rng.random() < 0.4 else "")

    return "|".join("".join(part() for _ in range(rng.randrange(4)))
                    for _ in range(rng.choice([1, 1, 1, 2, 3])))


def test_random_patterns_match_as_with_re():
    """Where matches may end, and which end `re` finds first."""
    rng, compared = random.Random(0), 0
    while compared < 10_000:
        pattern = random_pattern(rng)
        try:
            peer = re.compile(pattern)
        except re.error:
            continue
        for _ in range(5):
            text = "".join(rng.choices("ab.01\n", [3, 3, 2, 1, 1, 0.3], k=rng.randrange(9)))
            found = peer.match(text)
            got = ends(pattern, text)
            assert (got[0] if got else None) == (found.end() if found else None), (pattern, text)
            assert (len(text) in got) == bool(peer.fullmatch(text)), (pattern, text)
            compared += 1
