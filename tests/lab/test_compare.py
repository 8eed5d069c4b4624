import json

import numpy as np
import pytest

from minilora.files.checkpoint import load_base
from minilora.files.peft_read import load_adapter
from minilora.lab import compare, plots
from minilora.lab.compare import Settings

TINY = Settings(base="small", ranks=(1, 2), steps=4, seeds=2)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    return compare.compare(TINY, folder, progress=False), folder


def test_every_method_and_seed_is_measured(result):
    runs = result[0]["runs"]
    assert [(r["rank"], r["seed"]) for r in runs] == [
        (rank, seed) for seed in (0, 1) for rank in (None, 1, 2)
    ]
    for run in runs:
        assert run["trainable"] == {None: 110_336, 1: 2_304, 2: 4_608}[run["rank"]]
        assert run["training_bytes"] == 12 * run["trainable"]
        assert run["file_bytes"] > 4 * run["trainable"]
        assert run["code_after"] < run["code_before"] and run["ms_per_step"] > 0
        if run["rank"] is not None:
            assert run["file_bytes"] < 0.1 * 4 * 110_336
            assert run["docs_removed"] == result[0]["docs_base"] != run["docs_after"]
    assert runs[0]["code_after"] != runs[3]["code_after"], "seeds must differ"


def test_numbers_and_adapters_are_written(result):
    numbers, folder = result
    assert json.loads((folder / "compare.json").read_text())["runs"] == numbers["runs"]
    assert sorted(p.name for p in (folder / "adapters").iterdir()) == [
        "r1-seed0", "r1-seed1", "r2-seed0", "r2-seed1",
    ]
    model = load_adapter(load_base("small"), folder / "adapters" / "r2-seed0")
    data = compare.Data.for_context(64)
    loss = compare.evaluate(model, data.code_held_out)
    assert loss == pytest.approx(numbers["runs"][2]["code_after"], rel=1e-4)


def test_the_tables_say_mean_spread_and_return_to_the_base(result):
    numbers = result[0]
    costs, gains = (dict(zip(("head", *names), rows, strict=True)) for names, rows in (
        (("full", "LoRA r=1", "LoRA r=2"), compare.costs(numbers)),
        (("before", "full", "LoRA r=1", "LoRA r=2"), compare.gains(numbers))))
    assert all(row[0] == name for rows in (costs, gains) for name, row in rows.items()
               if name != "head")
    assert costs["full"][1:3] == ["110,336", "100.0%"] and costs["LoRA r=2"][1] == "4,608"
    assert len({run["code_before"] for run in numbers["runs"]}) == 1, "LoRA starts as the base"
    before = numbers["runs"][0]["code_before"], numbers["docs_base"]
    assert gains["before"][1:] == [f"{before[0]:.3f}", "0%", f"{before[1]:.3f}", ""]
    assert gains["full"][2] == "100% ± 0%" and gains["full"][-1] == "load the base again"
    assert "±" in gains["LoRA r=2"][1] and gains["LoRA r=2"][-1].endswith("= base, exactly")
    broken = json.loads(json.dumps(numbers))
    broken["runs"][1]["docs_removed"] += 1e-9
    assert "DIFFERS" in compare.table(broken)


def test_the_tables_are_at_most_100_columns_wide(result):
    wide = json.loads(json.dumps(result[0]))
    for run in wide["runs"]:
        run |= {"ms_per_step": 12345.6, "training_bytes": 123456789, "file_bytes": 123456789}
        if run["rank"]:
            run |= {"method": "LoRA r=128", "trainable": 1_234_567,
                    "docs_removed": run["docs_removed"] + run["seed"] / 10}
    text = compare.table(wide)
    assert "LoRA r=128" in text and "12346" in text and "DIFFERS" in text and "±" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", plots.COMPARISON)
def test_figures_have_labels_and_are_png(result, tmp_path, name):
    figure = plots.COMPARISON[name](result[0])
    assert all(ax.get_xlabel() for ax in figure.axes)
    plots.save(figure, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_target_modules_and_alpha_are_used():
    settings = Settings(base="small", alpha=3.0, target_modules=("q_proj", "v_proj"))
    model, lr = compare.prepare(settings, 4, 0)
    assert model.num_parameters(trainable_only=True) == 2 * 2 * 4 * (64 + 64)
    assert model.h[0].attn.q_proj.lora.scale == 0.75 and lr == compare.LORA_LEARNING_RATE
    assert compare.prepare(Settings(base="small"), None, 0)[1] == compare.FULL_LEARNING_RATE


@pytest.mark.parametrize(
    "settings, words",
    [
        (Settings(ranks=()), "at least one rank"), (Settings(seeds=0), "one seed"),
        (Settings(steps=1), "steps must be 2"), (Settings(base="huge"), "got 'huge'"),
        (Settings(ranks=(2, 0)), "rank must be 1 or more, got 0"),
        (Settings(target_modules=("q_porj",)), "did you mean 'q_proj'"),
    ],
)
def test_bad_settings_are_refused_before_any_training(tmp_path, monkeypatch, settings, words):
    monkeypatch.setattr(compare, "fit", None)
    with pytest.raises(ValueError, match=words):
        compare.compare(settings, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_keeps_the_runs_that_are_whole(tmp_path, monkeypatch):
    real, calls = compare.fine_tune, []

    def interrupted(*args, **options):
        history = real(*args, **options)
        calls.append(history)
        history.interrupted = len(calls) == 2
        return history

    monkeypatch.setattr(compare, "fine_tune", interrupted)
    numbers = compare.compare(TINY, tmp_path, progress=False)
    assert [run["method"] for run in numbers["runs"]] == ["full"] and len(calls) == 2
    assert "full" in compare.table(numbers)
    assert not (tmp_path / "adapters").exists(), "of half a run nothing is kept"
    monkeypatch.setattr(compare, "evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare.compare(TINY, tmp_path, progress=False)


def interrupt(*args):
    raise KeyboardInterrupt


def test_smooth_is_a_running_mean():
    np.testing.assert_allclose(plots.smooth([1, 2, 3, 4], 2), [1, 1.5, 2.5, 3.5])


def test_learning_rate_curves_put_what_diverged_at_the_top():
    curves = {"a": {0.1: 1.0, 1.0: 1.5, 10.0: float("nan"), 100.0: 9.0}}
    ax = plots.learning_rate_curves(curves, 2.0, "loss").axes[0]
    assert sum(line.get_marker() == "x" for line in ax.lines) == 2
    assert ax.get_ylim()[1] < 3
