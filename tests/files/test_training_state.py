"""The whole state of a run in one file."""

import json

import numpy as np
import pytest
from conftest import tiny_config

import minilora as ml
from minilora.files.safetensors import load_metadata
from minilora.files.training_state import load_state, read_about, save_state

IDS = np.arange(24).reshape(4, 6) % 11


def made(seed=0, dropout=0.3):
    model = ml.replace_linear_with_lora(ml.GPT(tiny_config(dropout=dropout)), 2, 4, rng=seed)
    return model, ml.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)


def train(model, optimizer, steps, history=None, threads=2):
    return ml.fit(model, [(IDS, np.roll(IDS, -1, 1))] * 9, optimizer, steps, history=history,
                  progress=False, threads=threads, schedule=ml.cosine_schedule(1e-2, 9))


def test_a_run_goes_on_in_the_same_bits(tmp_path):
    whole, optimizer = made()
    expected = train(whole, optimizer, 9)
    first, optimizer = made()
    save_state(tmp_path / "s", first, optimizer, train(first, optimizer, 4), {"name": "é"})
    second, optimizer = made(seed=1)
    second.drop.rng.random(7)
    history = load_state(tmp_path / "s", second, optimizer)
    assert read_about(tmp_path / "s") == {"name": "é"} and len(history.losses) == 4
    got = train(second, optimizer, 9, history)
    assert got.losses == expected.losses and got.learning_rates == expected.learning_rates
    for (name, p), (_, q) in zip(
            whole.named_parameters(), second.named_parameters(), strict=True):
        assert np.array_equal(p.data, q.data), name


def test_a_state_at_the_beginning_has_no_moments(tmp_path):
    model, optimizer = made()
    save_state(tmp_path / "s", model, optimizer, ml.History(), {})
    assert all(name.startswith("model/") for name in ml.load_safetensors(tmp_path / "s"))
    assert load_state(tmp_path / "s", *made()).steps == []


def test_a_state_of_something_else_is_refused_and_changes_nothing(tmp_path):
    model, optimizer = made()
    save_state(tmp_path / "s", model, optimizer, train(model, optimizer, 1), {})
    other = ml.replace_linear_with_lora(ml.GPT(tiny_config()), 3, 4, rng=0)
    before = {name: p.data.copy() for name, p in other.named_parameters()}
    trained = [p for p in other.parameters() if p.requires_grad]
    for optimizer in (ml.AdamW(trained), ml.SGD(trained)):
        with pytest.raises(ml.CheckpointError, match="is not a state of this run: .*another"):
            load_state(tmp_path / "s", other, optimizer)
    assert all(np.array_equal(p.data, before[name]) for name, p in other.named_parameters())
    with pytest.raises(FileNotFoundError):
        read_about(tmp_path / "nothing")
    ml.save_checkpoint(ml.GPT(tiny_config()), tmp_path / "model")
    for path in ("model", "text"):
        (tmp_path / "text").write_text("no state" * 9)
        with pytest.raises(ml.CheckpointError):
            read_about(tmp_path / path)


@pytest.mark.parametrize("change", [
    {"history": {"steps": 1, "no": 2}}, {"history": None}, {"groups": []}, {"steps": {"99": 1}},
    {"steps": {"x": 1}}, {"generators": {}}, {"generators": None}, {"about": 3}])
def test_damaged_metadata_is_one_kind_of_error(tmp_path, change):
    model, optimizer = made()
    save_state(tmp_path / "s", model, optimizer, train(model, optimizer, 1), {})
    tensors = ml.load_safetensors(tmp_path / "s")
    run = json.loads(load_metadata(tmp_path / "s")["run"]) | change
    ml.save_safetensors(tmp_path / "s", tensors, {"run": json.dumps(run)})
    with pytest.raises(ml.CheckpointError, match="is not (a state of this run|the state of a tr)"):
        load_state(tmp_path / "s", *made())
