"""Fine-tuning on one's own data, in Python."""

import warnings

import numpy as np
import pytest
from helpers_llama import TOKENIZER, tiny_llama

import minilora as ml
from minilora.data.corpus import module_source
from minilora.data.encoded import Examples
from minilora.lab.finetune import KINDS, Settings, exact_answers, prepare

CODE = module_source("bisect")
PAIRS = [("ab", "x"), ("cdcd", "y")] * 6
QUICK = {"steps": 6, "batch_size": 4, "progress": False, "threads": 1}


def test_a_text_in_a_few_lines():
    model = ml.load_base("small")
    history = ml.finetune(model, CODE, rank=4, **QUICK | {"steps": 30})
    losses = history.validation_losses
    assert len(history.losses) == 30 and losses[-1] < losses[0] - 0.2
    assert history.validation_steps == [0, 5, 10, 15, 20, 25, 30]
    assert ml.get_adapter(model).layers["h.0.attn.q_proj"].rank == 4
    assert ml.get_adapter(model).layers["h.0.attn.q_proj"].alpha == 8.0
    ml.remove_lora(model)
    base = ml.load_base("small").state_dict()
    assert all(np.array_equal(a, base[name]) for name, a in model.state_dict().items())


def test_it_is_the_training_that_could_be_written_by_hand():
    model = ml.load_base("small")
    history = ml.finetune(model, CODE, seed=3, val_fraction=0.0, **QUICK)
    other = ml.replace_linear_with_lora(ml.load_base("small"), 8, 16, rng=3)
    from minilora.data.batches import random_batches

    ids = ml.CharTokenizer().encode(CODE)
    optimizer = ml.AdamW([p for p in other.parameters() if p.requires_grad], 1e-2, weight_decay=0.0)
    expected = ml.fit(other, random_batches(ids, 4, 64, 3), optimizer, 6,
                      ml.cosine_schedule(1e-2, 6), clip_norm=1.0, progress=False, threads=1)
    assert history.losses == expected.losses and not history.validation_losses


def test_prompts_with_answers_are_learned():
    rows = [[{"role": "system", "content": "s"}, {"role": "user", "content": p},
             {"role": "assistant", "content": a}] for p, a in PAIRS]
    model = tiny_llama()
    given = QUICK | {"steps": 40, "lr": 1e-2, "batch_size": 8, "full": True}
    history = ml.finetune(model, rows, tokenizer=TOKENIZER, **given)
    assert history.validation_losses[-1] < 0.05 < history.validation_losses[0]
    encoded = Examples.encode(rows[:2], TOKENIZER, 128)
    assert exact_answers(model, TOKENIZER, encoded) == 2
    encoded.answers[0] = "z"
    assert exact_answers(model, TOKENIZER, encoded) == 1
    assert exact_answers(tiny_llama(), TOKENIZER, encoded) == 0


def test_pairs_have_the_system_message_of_the_template():
    history = ml.finetune(tiny_llama(256), PAIRS, tokenizer=TOKENIZER, **QUICK | {"lr": 1e-2})
    assert history.validation_losses[-1] < history.validation_losses[0]


def test_a_language_model_learns_text_from_a_folder_and_is_evaluated_on_another(tmp_path):
    (tmp_path / "a.txt").write_text("abcabc" * 60)
    (tmp_path / "b.txt").write_text("abc" * 20)
    history = ml.finetune(tiny_llama(), tmp_path, tmp_path / "b.txt", TOKENIZER,
                          lr=1e-2, **QUICK | {"steps": 20})
    assert history.validation_losses[-1] < history.validation_losses[0] - 1.0


def test_full_fine_tuning_trains_everything():
    model = ml.load_base("small")
    model.freeze()
    history = ml.finetune(model, CODE, full=True, **QUICK)
    assert model.num_parameters(trainable_only=True) == 110_336
    assert history.learning_rates[0] == KINDS["characters"].full_lr
    base = ml.load_base("small").state_dict()
    assert not any(np.array_equal(a, base[name]) for name, a in model.state_dict().items())


def test_layers_that_are_adapted_already_are_trained():
    model = ml.replace_linear_with_lora(ml.load_base("small"), 2, 4, ["v_proj"], rng=0)
    ml.finetune(model, CODE, **QUICK)
    assert [f.rank for f in ml.get_adapter(model).layers.values()] == [2, 2]


def test_samples_are_the_same_each_time_and_change_with_training():
    job = prepare(ml.load_base("small"), CODE, None, None, Settings(steps=20, threads=1))
    (prompt, before), = job.samples()
    assert [(prompt, before)] == job.samples() and len(before) == 200
    assert prompt == CODE[len(job.training.ids):][:32]
    job.train(progress=False)
    assert job.samples()[0][0] == prompt and job.samples()[0][1] != before
    job = prepare(tiny_llama(256), PAIRS, None, TOKENIZER, Settings())
    assert {prompt for prompt, _ in job.samples()} <= {"ab", "cdcd"}


def test_characters_that_are_left_out_are_a_warning():
    with pytest.warns(UserWarning, match="'ü' 40"):
        ml.finetune(ml.load_base("small"), CODE + "ü" * 40, **QUICK)


def test_short_data_are_used_as_far_as_they_go():
    job = prepare(ml.load_base("small"), "abcdefgh" * 4, None, None, Settings())
    assert job.training.context_length == 28 and job.held_out.context_length == 2
    assert job.settings.context_length == 64
    job = prepare(tiny_llama(256), PAIRS[:2], None, TOKENIZER, Settings())
    assert len(next(job.training.batches(8, 0))[0]) == 1


@pytest.mark.parametrize("make, data, given, words", [
    (ml.load_base, CODE, {"rank": 0}, "rank must be 1 or more, got 0"),
    (ml.load_base, CODE, {"steps": 2.5}, "steps must be a whole number"),
    (ml.load_base, CODE, {"batch_size": -1}, "batch_size must be 1 or more"),
    (ml.load_base, CODE, {"context_length": 999}, "a context of 128 tokens, not of 999"),
    (ml.load_base, CODE, {"val_fraction": 1.0}, "val_fraction must be 0 or more and less than 1"),
    (ml.load_base, CODE, {"target_modules": ["q_porj"]}, "did you mean 'q_proj'"),
    (ml.load_base, CODE, {"rnak": 3}, "rnak"), (ml.load_base, CODE, {"threads": 0}, "threads"),
    (ml.load_base, CODE, {"lr": -1.0}, "lr must be above 0"),
    (ml.load_base, CODE, {"seed": -1}, "seed must be 0 or more"),
    (ml.load_base, PAIRS, {}, "prompts with answers need a language model"),
    (ml.load_base, "ab", {}, "too short"), (ml.load_base, "", {}, "empty text"),
    (ml.load_base, CODE, {"validation": PAIRS}, "need a language model"),
    (tiny_llama, CODE, {}, "needs its tokenizer"),
    (tiny_llama, PAIRS, {"validation": CODE, "tokenizer": TOKENIZER}, "of another kind"),
    (lambda: tiny_llama(256), PAIRS[:1], {"tokenizer": TOKENIZER}, "too few to hold"),
    (lambda: ml.quantize(tiny_llama()), PAIRS, {"full": True, "tokenizer": TOKENIZER},
     "weights in 4 or 8 bits cannot be trained"),
    (lambda: ml.replace_linear_with_lora(tiny_llama(), 1, 1), PAIRS,
     {"full": True, "tokenizer": TOKENIZER}, "has an adapter"),
    (lambda: ml.Linear(2, 2), CODE, {}, "a GPT or a Llama, got Linear"),
])
def test_what_does_not_go_together_is_said_and_nothing_changes(make, data, given, words):
    model = make()
    before = model.state_dict().keys()
    with pytest.raises((ValueError, TypeError), match=words), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ml.finetune(model, data, progress=False, **given)
    assert model.state_dict().keys() == before
