import importlib

import numpy as np
import pytest

from minilora.data import corpus as text
from minilora.data.batches import random_batches, sequential_batches
from minilora.data.tokenizer import CharTokenizer, plain


def test_tokenizer_round_trip_and_fixed_vocabulary():
    tokenizer = CharTokenizer()
    assert tokenizer.vocab_size == 96 and len(set(tokenizer.characters)) == 96
    assert tokenizer.decode(tokenizer.encode(tokenizer.characters)) == tokenizer.characters
    assert tokenizer.encode(tokenizer.characters).tolist() == list(range(96))
    assert tokenizer.encode("").shape == (0,) and tokenizer.decode(np.zeros(0, int)) == ""


@pytest.mark.parametrize("bad, shown", [("ab\tc", r"'\\t' at 2"), ("é", "'é' at 0"),
                                        ("x\x7f", "at 1"), ("\U0001f600", "at 0")])
def test_tokenizer_names_what_it_does_not_know(bad, shown):
    with pytest.raises(ValueError, match=shown):
        CharTokenizer().encode(bad)


@pytest.mark.parametrize("bad", [-1, 96])
def test_decode_names_a_bad_id(bad):
    with pytest.raises(ValueError, match=rf"id {bad} at \(1,\) is not in 0..95"):
        CharTokenizer().decode([0, bad])


def test_plain_makes_any_text_encodable():
    assert plain("\u201ca\u2019b\u201d \u2014\t\u00e9x\r\n") == "\"a'b\" --    x\n"
    CharTokenizer().encode(plain("".join(map(chr, range(3000)))))


@pytest.mark.parametrize("name", ["docs", "code"])
def test_corpora_are_long_plain_and_split_without_overlap(name):
    whole = text.corpus(name)
    assert len(whole) > 200_000
    training, held_out = text.load_tokens(name)
    assert len(training) + len(held_out) + 2 == len(whole)
    assert 0.05 < len(held_out) / len(whole) < 0.15


def test_held_out_docs_do_not_repeat_the_training_text():
    training, held_out = text.split(text.corpus("docs"))
    paragraphs = [p for p in held_out.split("\n\n") if len(p) > 60]
    assert len(paragraphs) > 100
    assert not set(paragraphs) & set(training.split("\n\n"))


def test_the_split_stays_when_the_text_changes_elsewhere():
    paragraphs = [f"This is paragraph number {i}." for i in range(2000)]
    one = text.split("\n\n".join(paragraphs))
    two = text.split("\n\n".join([*paragraphs[:300], "a new one", *paragraphs[320:]]))
    moved = set(one[0].split("\n\n")) & set(two[1].split("\n\n"))
    assert len(moved) < 20 and len(one[1]) > 0.05 * len(one[0])


def test_without_pydoc_data_docstrings_take_its_place(monkeypatch, capsys):
    real = importlib.import_module

    def without(name):
        if name.startswith("pydoc_data"):
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(text.importlib, "import_module", without)
    assert len(text.corpus("docs")) > 50_000
    assert "pydoc_data is missing" in capsys.readouterr().err


def test_an_unknown_corpus():
    with pytest.raises(ValueError, match="'docs' or 'code', got 'french'"):
        text.corpus("french")


def test_random_batches_are_windows_and_reproducible():
    ids = np.arange(100)
    x, y = next(random_batches(ids, 7, 10, rng=1))
    assert x.shape == y.shape == (7, 10) and np.array_equal(y, x + 1)
    assert np.array_equal(next(random_batches(ids, 7, 10, rng=1))[0], x)
    starts = {int(x[0, 0]) for x, _ in zip_first(random_batches(np.arange(13), 1, 10), 100)}
    assert starts == {0, 1, 2}, "every window can be drawn, the last one too"


def zip_first(iterator, n):
    return [next(iterator) for _ in range(n)]


def test_sequential_batches_cover_the_text_once():
    batches = sequential_batches(np.arange(101), 3, 10)
    assert [len(x) for x, _ in batches] == [3, 3, 3, 1]
    assert np.array_equal(np.concatenate([x.ravel() for x, _ in batches]), np.arange(100))
    limited = sequential_batches(np.arange(101), 2, 10, limit=2)
    assert [x[:, 0].tolist() for x, _ in limited] == [[0, 30], [60, 90]]


def test_wrong_types_and_sizes():
    with pytest.raises(TypeError, match="encode takes a str, got bytes"):
        CharTokenizer().encode(b"a")
    with pytest.raises(TypeError, match="integers"):
        CharTokenizer().decode([1.5])
    for sizes in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="must be 1 or more, got 0"):
            sequential_batches(np.arange(50), *sizes)


def test_texts_that_are_too_short():
    for batches in (lambda: next(random_batches(np.arange(10), 1, 10)),
                    lambda: sequential_batches(np.arange(10), 1, 10)):
        with pytest.raises(ValueError, match="10 tokens are too few for a context of 10"):
            batches()
