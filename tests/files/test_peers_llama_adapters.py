"""Adapters of Llamas: files of PEFT's for LlamaForCausalLM, both ways, on 4-bit bases as well."""

import importlib.util

import numpy as np
import pytest

import minilora as ml

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
NEEDED = ("torch", "transformers", "peft", "safetensors")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if MISSING:
    reason = f"the extra 'peers' is not installed: no {', '.join(MISSING)}"
    pytest.skip(reason, allow_module_level=True)

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "all seven": dict(target_modules=PROJECTIONS),
    "attention": dict(target_modules=["q_proj", "v_proj"]),
    "all-linear": dict(target_modules="all-linear"),
    "upper layer": dict(target_modules=PROJECTIONS, layers_to_transform=[1]),
    "rslora": dict(target_modules=PROJECTIONS, use_rslora=True),
    "dora": dict(target_modules=["q_proj", "down_proj"], use_dora=True),
    "rank pattern": dict(target_modules=PROJECTIONS, rank_pattern={"k_proj": 1, "mlp.up_proj": 5}),
    "regex": dict(target_modules=r"model\.layers\.1\..*_proj"),
    "saved norms": dict(target_modules=["q_proj"], modules_to_save=["norm"]),
    "saved embedding": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "dropout": dict(target_modules=["q_proj"], lora_dropout=0.1),
}
IDS = np.random.default_rng(3).integers(0, 50, (2, 7))


def base(tied, quantised=False):
    config = ml.LlamaConfig(vocab_size=50, d_model=64, d_ff=96, n_layers=2, n_heads=4,
                            n_kv_heads=2, tie_weights=tied)
    model = ml.Llama(config, rng=0)
    rng = np.random.default_rng(1)
    for _, p in model.named_parameters():
        p.data[...] += rng.normal(0.0, 0.1, p.shape)
    model.freeze()
    return ml.quantize(model, "nf4") if quantised else model


def theirs(model, folder):
    ml.to_hf_llama(model, folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits.numpy()


def randomise(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.add_(0.1 * torch.randn_like(p))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_from_peft_and_back(tmp_path, case, tied):
    model = base(tied, quantised=case != "dora")
    hf = theirs(model, tmp_path / "base")
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM", **CASES[case]})
    adapted = peft.get_peft_model(hf, config).eval()
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "theirs")
    ml.load_adapter(model, tmp_path / "theirs")
    assert np.abs(model(IDS) - logits(adapted)).max() < 2e-5
    ml.save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32),
        tmp_path / "ours").eval()
    assert np.abs(logits(again) - logits(adapted)).max() < 2e-5


@pytest.mark.parametrize("quantised", [False, True])
def test_the_same_training_step_and_merge(tmp_path, quantised):
    """A step on a 4-bit base is PEFT's on the dequantised weights."""
    model = base(True, quantised)
    hf = theirs(model, tmp_path / "base")
    ml.replace_linear_with_lora(model, rank=3, alpha=6, target_modules=PROJECTIONS, rng=0)
    rng = np.random.default_rng(2)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            p.data[...] = rng.normal(0.0, 0.1, p.shape)
    ml.save_adapter(model, tmp_path / "start")
    adapted = peft.PeftModel.from_pretrained(hf, tmp_path / "start", is_trainable=True)
    targets = np.where(rng.random(IDS.shape) < 0.6, rng.integers(0, 50, IDS.shape), -100)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    flat = adapted(input_ids=torch.tensor(IDS)).logits.reshape(-1, 50)
    loss = torch.nn.functional.cross_entropy(flat, torch.tensor(targets).reshape(-1))
    loss.backward()
    optimizer.step()
    ours = ml.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    history = ml.fit(model, [(IDS, targets)], ours, 1, progress=False, loss=ml.answer_loss)
    assert abs(history.losses[0] - loss.item()) < 1e-5
    after = logits(adapted.eval())
    assert np.abs(model(IDS) - after).max() < 1e-3  # Adam divides by gradients near zero
    merged = logits(adapted.merge_and_unload())
    ml.merge_lora(model)
    assert np.abs(model(IDS) - merged).max() < 1e-3
    ml.unmerge_lora(model)
    ml.remove_lora(model)
    assert np.array_equal(model(IDS), base(True, quantised)(IDS))
