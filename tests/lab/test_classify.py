import numpy as np
import pytest

import minilora as ml
from minilora.lab.classify import (
    accuracy,
    encode_labelled,
    predict,
    prose_or_code,
    shuffled_batches,
)
from minilora.nn.functional import IGNORE_INDEX


def labels(data):
    return data[1][data[1] != IGNORE_INDEX]


def classifier(width=2):
    model = ml.load_base("small")
    model.lm_head = ml.Linear(64, width, rng=0)
    return model


def test_the_label_is_at_the_last_token():
    ids, targets = encode_labelled(["abc", "x = 1", "much too long"], [1, 0, 2], 6)
    assert ids.shape == targets.shape == (3, 6)
    assert [int(np.flatnonzero(row != IGNORE_INDEX)[0]) for row in targets] == [2, 4, 5]
    assert list(labels((ids, targets))) == [1, 0, 2]
    assert ml.CharTokenizer().decode(ids[1, :5]) == "x = 1"


def test_the_task_is_balanced_and_its_parts_are_apart():
    training, held_out = prose_or_code(64, limit=300)
    assert len(training[0]) == 600 and len(held_out[0]) == 60
    for part in (training, held_out):
        assert labels(part).mean() == 0.5
        assert len({row.tobytes() for row in part[0]}) == len(part[0])
    assert not {r.tobytes() for r in training[0]} & {r.tobytes() for r in held_out[0]}
    again, _ = prose_or_code(64, limit=300)
    assert np.array_equal(training[0], again[0])
    other, _ = prose_or_code(64, limit=300, rng=1)
    assert not np.array_equal(training[0], other[0])


def test_every_row_comes_once_before_any_comes_again():
    data = np.arange(10)[:, None], np.zeros((10, 1), int)
    batches = shuffled_batches(data, 4)
    rows = np.concatenate([next(batches)[0].ravel() for _ in range(5)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))


def test_padding_changes_nothing():
    model = classifier()
    short = encode_labelled(["def f(x):"], [0], 9)
    padded = encode_labelled(["def f(x):"], [0], 64)
    np.testing.assert_allclose(model(short[0])[:, 8], model(padded[0])[:, 8], atol=1e-5)
    assert predict(model, short) == predict(model, padded)
    assert model.training


def test_lora_learns_it_and_its_file_holds_the_head(tmp_path):
    training, held_out = prose_or_code(64, limit=1500)
    model = classifier()
    assert 0.35 < accuracy(model, held_out) < 0.65
    ml.replace_linear_with_lora(model, 8, 16, modules_to_save="lm_head", rng=0)
    optimizer = ml.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    ml.fit(model, shuffled_batches(training, 32), optimizer, 80, clip_norm=1.0, progress=False)
    after = accuracy(model, held_out)
    assert after > 0.72
    ml.save_adapter(model, tmp_path)
    again = ml.load_adapter(ml.load_base("small"), tmp_path)
    assert accuracy(again, held_out) == after
    assert isinstance(ml.remove_lora(again).lm_head, ml.TiedHead)


@pytest.mark.parametrize("texts, classes, words", [
    ([], [], "0 texts"), (["a"], [0, 1], "1 texts need as many labels, got 2"),
    (["a", ""], [0, 1], "text 1 is empty"), (["\u00e9"], [0], "not newline or printable"),
])
def test_what_cannot_be_encoded(texts, classes, words):
    with pytest.raises(ValueError, match=words):
        encode_labelled(texts, classes, 4)
