import numpy as np
import pytest

import minilora as ml


def pytest_collection_finish(session):
    """Start the notebooks before the first test: they take longest, and most use one core."""
    wanted = [item for item in session.items if item.name.startswith("test_the_notebook_runs")]
    if wanted and not session.config.option.collectonly:
        wanted[0].module.start_all()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def tiny_config(**changes):
    sizes = dict(vocab_size=11, context_length=6, d_model=8, n_layers=2, n_heads=2)
    return ml.GPTConfig(**(sizes | changes))


def randomise(model, scale=0.3, seed=1):
    """Move every parameter off its initial value: zeros and ones hide mistakes."""
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.data += scale * rng.standard_normal(parameter.shape)
    return model


@pytest.fixture
def tiny_gpt():
    return ml.GPT(tiny_config(), rng=0)


@pytest.fixture
def ids(rng):
    return rng.integers(0, 11, (3, 6))
