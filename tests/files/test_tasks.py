import numpy as np
import pytest
from conftest import randomise, tiny_config
from helpers_adapters import base, close, task, updates

import minilora as ml
from minilora.lora.surgery import wrappers


@pytest.fixture
def tasks(tmp_path):
    tasks = ml.AdapterSet(base())
    tasks.add("one", ml.get_adapter(task(1)))
    ml.save_adapter(task(2, ["q_proj", "down_proj"], 3), tmp_path / "two")
    tasks.add("two", tmp_path / "two")
    tasks.add("dora", ml.get_adapter(task(3, ["up_proj", "v_proj"], use_dora=True)))
    return tasks


def test_switching(tasks, ids):
    plain, before = base()(ids), base().state_dict()
    assert tasks.names == ["one", "two", "dora"] and tasks.active is None
    assert np.array_equal(tasks.model(ids), plain)
    expected = {"one": task(1), "two": task(2, ["q_proj", "down_proj"], 3)}
    for name in ("one", "two", "one", None, "two", "dora", None):
        tasks.set_active(name)
        assert tasks.active == name
        if name in expected:
            assert np.array_equal(tasks.model(ids), expected[name](ids))
            assert {n for n, p in tasks.model.named_parameters() if p.requires_grad} \
                == set(ml.lora_state_dict(expected[name]))
    assert np.array_equal(tasks.model(ids), plain)
    assert all(np.array_equal(a, before[n]) for n, a in tasks.model.state_dict().items())
    tasks.set_active("one")
    ml.merge_lora(tasks.model)
    tasks.set_active(None)
    assert np.array_equal(tasks.model(ids), plain)
    tasks.set_active("one")
    assert np.array_equal(tasks.model(ids), expected["one"](ids))


def test_training_one_leaves_the_others(tasks, ids):
    tasks.add("new", rank=1, alpha=2, target_modules="q_proj", dropout=0.1, rng=0)
    others = {name: updates(tasks.get(name)) for name in ("one", "two")}
    tasks.set_active("new")
    assert tasks.model.h[0].attn.q_proj.dropout.training
    optimizer = ml.AdamW([p for p in tasks.model.parameters() if p.requires_grad], 0.05)
    history = ml.fit(tasks.model, [(ids, ids)] * 20, optimizer, 20, progress=False)
    assert history.losses[-1] < history.losses[0]
    for name, before in others.items():
        close(updates(tasks.get(name)), before, 0.0)
    assert tasks.active == "new"
    assert any(delta.any() for delta in updates(tasks.get("new")).values())


def test_saving_and_removing(tasks, tmp_path, ids):
    tasks.set_active("two")
    tasks.save("one", tmp_path / "one")
    assert tasks.active == "two"
    assert np.array_equal(ml.load_adapter(base(), tmp_path / "one")(ids), task(1)(ids))
    tasks.remove("two")
    assert tasks.active is None and tasks.names == ["one", "dora"]
    assert not wrappers(tasks.model)
    assert repr(tasks) == "AdapterSet(one, dora; active: None)"


def test_every_row_its_own_task(tasks, ids):
    tasks.model.train()
    rows = np.concatenate([ids, ids, ids[:1]])
    names = ["one", "two", None, "one", "dora", "dora", "two"]
    tasks.set_active("two")
    mixed = tasks(rows, names)
    assert tasks.active == "two" and tasks.model.training and tasks.model.h[0].attn.training
    for row, name, got in zip(rows, names, mixed, strict=True):
        tasks.set_active(name)
        assert np.allclose(got, tasks.model(row[None])[0], atol=1e-5)
    tasks.set_active(None)
    assert np.allclose(tasks(rows, [None] * 7), tasks.model(rows), atol=1e-6)
    assert not wrappers(tasks.model)


def test_the_base_product_is_done_once(tasks, ids, monkeypatch):
    calls = []
    forward = ml.Linear.forward
    monkeypatch.setattr(ml.Linear, "forward", lambda self, x: calls.append(x) or forward(self, x))
    tasks(ids, ["one", "two", "dora"])
    assert len(calls) == 2 * 6 + 1 and all(len(x) == 3 for x in calls)


def test_rows_with_heads_of_their_own(ids):
    tasks = ml.AdapterSet(base(tie_weights=True))
    for seed, width in ((1, 2), (2, 2), (3, 5)):
        model = base(tie_weights=True)
        model.lm_head = ml.Linear(8, width, rng=seed)
        tasks.add(f"heads{seed}", ml.get_adapter(randomise(task(seed, "q_proj", model=model))))
    names = ["heads1", "heads2", "heads1"]
    mixed = tasks(ids, names)
    assert mixed.shape == (3, 6, 2)
    for row, name, got in zip(ids, names, mixed, strict=True):
        tasks.set_active(name)
        assert np.allclose(got, tasks.model(row[None])[0], atol=1e-5)
    tasks.set_active("heads1")
    alone = tasks(ids, ["heads1"] * 3)
    assert alone.dtype == np.float32 and np.allclose(alone, tasks.model(ids), atol=1e-5)
    with pytest.raises(ValueError, match="heads differ in width"):
        tasks(ids, ["heads1", "heads2", "heads3"])
    with pytest.raises(ValueError, match="heads differ in width"):
        tasks(ids, ["heads1", "heads2", None])
    assert tasks.active == "heads1" and tasks.model(ids).shape == (3, 6, 2)


def test_what_cannot_be(tasks, ids, tmp_path):
    for call, kind, words in [
        (lambda: tasks.set_active("oen"), ValueError, "no task 'oen'; did you mean 'one'"),
        (lambda: tasks.remove("x"), ValueError, "no task 'x'"),
        (lambda: tasks.add("one", rank=1, alpha=1), ValueError, "already"),
        (lambda: tasks.add("", rank=1, alpha=1), TypeError, "needs a name"),
        (lambda: tasks.add("x", tmp_path / "two", rank=1), TypeError, "rank: options"),
        (lambda: tasks.add("x", rank=0, alpha=1), ValueError, "rank must be"),
        (lambda: tasks.add("x", tmp_path / "none"), FileNotFoundError, "none"),
        (lambda: tasks.add("x", ml.get_adapter(task(1, model=ml.GPT(tiny_config(d_model=4))))),
         ValueError, "does not fit"),
        (lambda: tasks(ids, ["one"]), ValueError, "3 rows need"),
        (lambda: tasks(ids, ["one", "two", "x"]), ValueError, "no task 'x'"),
        (lambda: ml.AdapterSet(task()), ValueError, "has an adapter"),
        (lambda: ml.AdapterSet(ml.Linear(2, 2)), TypeError, "bare Linear"),
        (lambda: ml.AdapterSet("x"), TypeError, "expected a Module"),
    ]:
        tasks.set_active("one")
        with pytest.raises(kind, match=words):
            call()
        assert tasks.active == "one" and tasks.names == ["one", "two", "dora"]
        assert np.array_equal(tasks.model(ids), task(1)(ids))
    saved = ml.AdapterSet(base())
    saved.add("x", ml.get_adapter(task(1, "q_proj", modules_to_save=["wpe"])))
    with pytest.raises(ValueError, match="its own wpe: embeddings cannot be mixed"):
        saved(ids, ["x", None, "x"])


def test_a_module_and_a_part_of_it_cannot_share_a_batch(tasks, ids):
    tasks.add("whole", rank=1, alpha=1, target_modules="q_proj", modules_to_save=["h.1.mlp"])
    plain = tasks.model(ids)
    for names in (["whole", "one", None], ["one", "whole", None]):
        with pytest.raises(ValueError, match="has h.1.mlp whole and another parts of it"):
            tasks(ids, names)
        assert np.array_equal(tasks.model(ids), plain)
    assert np.isfinite(tasks(ids, ["whole", None, "whole"])).all()


@pytest.mark.parametrize("change", [
    ml.remove_lora, lambda model: ml.merge_lora(model, unload=True),
    lambda model: ml.attach(model, ml.get_adapter(task(9))),
])
def test_what_was_changed_behind_its_back_is_noticed(tasks, change):
    tasks.set_active("one")
    change(tasks.model)
    for name in ("one", "two", None):
        with pytest.raises(RuntimeError, match="changed by other means"):
            tasks.set_active(name)


def test_loading_onto_the_model_leaves_the_stored_tasks(tasks, ids):
    before = updates(tasks.get("one"))
    tasks.set_active("one")
    ml.attach(tasks.model, ml.get_adapter(task(9)))
    layer = tasks._tasks["one"]["h.0.attn.q_proj"]
    assert np.array_equal(layer.delta_weight(), before["h.0.attn.q_proj"])
