import os
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from tqdm import tqdm

import minilora as ml

# For mutation testing: always the same examples, and no search for the smallest one that fails.
settings.register_profile("mutation", derandomize=True, database=None,
                          phases=[Phase.explicit, Phase.generate])
# By default tqdm has one lock for all processes, which a child that is killed would keep for ever.
tqdm.set_lock(threading.RLock())

THOROUGH = bool(os.environ.get("MINILORA_THOROUGH"))  # takes many minutes, see `many`


def many(ordinary, thorough):
    """Choose how often to try: by default few times, and the same things in every run."""
    return thorough if THOROUGH else ordinary


def examples(ordinary, thorough=2_000):
    """Return the settings of a property test; thorough ones draw other examples in each run."""
    return settings(
        max_examples=many(ordinary, thorough), derandomize=not THOROUGH, database=None,
        deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much,
                                              HealthCheck.data_too_large],
    )


def pytest_collection_finish(session):
    """Start the notebooks before the first test: they take longest, and most use one core."""
    wanted = [item for item in session.items if item.name.startswith("test_the_notebook_runs")]
    if wanted and not session.config.option.collectonly:
        wanted[0].module.start([item.callspec.params["source"] for item in wanted])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def tiny_config(**changes):
    sizes = dict(vocab_size=11, context_length=6, d_model=8, n_layers=2, n_heads=2)
    return ml.GPTConfig(**(sizes | changes))


def llama_config(**changes):
    sizes = dict(vocab_size=11, d_model=8, d_ff=12, n_layers=2, n_heads=4, n_kv_heads=2,
                 context_length=6)
    return ml.LlamaConfig(**(sizes | changes))


def randomise(model, scale=0.3, seed=1):
    """Move every parameter off its initial value: zeros and ones hide mistakes."""
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        if type(parameter) is not ml.Parameter:
            continue  # quantised
        parameter.data += scale * rng.standard_normal(parameter.shape)
    return model


@pytest.fixture
def tiny_gpt():
    return ml.GPT(tiny_config(), rng=0)


@pytest.fixture
def ids(rng):
    return rng.integers(0, 11, (3, 6))
