"""A short lesson for SmolLM2 itself, where the model is installed."""

import numpy as np
import pytest

import minilora as ml
from minilora.files.gguf_llama import find_smollm2
from minilora.lab import tasks, teach

pytestmark = pytest.mark.peers
try:
    find_smollm2()
except FileNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)


def test_smollm2_learns_and_is_itself_again_without_the_adapter(tmp_path):
    model, tokenizer = ml.load_base("smollm2"), ml.load_tokenizer("smollm2")
    assert model.num_parameters() == 134_515_008 and ml.stored_bytes(model) < 97_000_000
    ids = tokenizer.chat("What is the capital of France?")[None]
    logits = model(ids)
    question = ["What is the capital of France?"]
    assert "Paris" in teach.answers(model, tokenizer, question, max_new_tokens=8)[0]
    task = tasks.commands(training=40, known=4, unknown=1)
    lesson = teach.Lesson(upper=4, steps=16, learning_rate=3e-3)
    outcome = teach.teach(model, tokenizer, task, lesson, progress=False, validate_every=16)
    before, after = outcome.history.validation_losses
    assert before > 2.5 and after < 0.5 * before
    assert all(answer.startswith('{"do": "') for answer in outcome.answers["known rooms"])
    ml.save_adapter(model, tmp_path / "adapter")
    adapted = model(ids)
    assert not np.array_equal(adapted, logits)
    ml.remove_lora(model)
    np.testing.assert_array_equal(model(ids), logits)
    ml.load_adapter(model, tmp_path / "adapter")
    np.testing.assert_array_equal(model(ids), adapted)
