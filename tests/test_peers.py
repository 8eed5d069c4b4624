"""Against PyTorch, PEFT and safetensors themselves: pip install minilora[peers]."""

import importlib.util

import numpy as np
import pytest
from test_golden import compare_runs, our_run

import minilora as ml

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
MISSING = [n for n in ("torch", "peft", "safetensors") if importlib.util.find_spec(n) is None]
if MISSING:
    reason = f"the extra 'peers' is not installed: no {', '.join(MISSING)}"
    pytest.skip(reason, allow_module_level=True)

import peer_runs  # noqa: E402
import torch  # noqa: E402

from minilora.lab.torch_peer import TorchGPT, add_peft_lora, copy_weights  # noqa: E402
from minilora.lora.surgery import lora_layers  # noqa: E402


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lora", [False, True])
def test_logits_losses_gradients_and_ten_steps(lora, seed):
    model, ids, targets = peer_runs.start(np.random.default_rng(seed))
    theirs = peer_runs.torch_run(model, ids, targets, lora)
    start = {k.removeprefix("start/"): a for k, a in theirs.items() if k.startswith("start/")}
    compare_runs(our_run(start, ids, targets, lora, np.float64), theirs, 1e-9)


@pytest.mark.parametrize("lora", [False, True])
def test_float32_logits_loss_and_gradients(lora):
    model, ids, targets = peer_runs.start(np.random.default_rng(0), np.float32)
    theirs = peer_runs.torch_run(model, ids, targets, lora)
    start = {k.removeprefix("start/"): a for k, a in theirs.items() if k.startswith("start/")}
    ours = our_run(start, ids, targets, lora, np.float32)

    def first(run):
        kept = {k: a for k, a in run.items() if k.startswith("grad/") or k == "logits"}
        return kept | {"losses": run["losses"][:1]}

    compare_runs(first(ours), first(theirs), 1e-5)


def fresh_peer(rng):
    model, ids, _ = peer_runs.start(rng, np.float32)
    peer = TorchGPT(peer_runs.CONFIG)
    copy_weights(model, peer)
    return model, peer, ids


def close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("scaling", ["alpha", "alpha/r", "alpha/sqrt(r)"])
def test_peft_loads_our_adapter(tmp_path, rng, scaling):
    from peft import PeftModel

    model, peer, ids = fresh_peer(rng)
    ml.replace_linear_with_lora(model, 3, 5, ["q_proj", "down_proj"], scaling=scaling, rng=0)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            p.data += rng.standard_normal(p.shape)
    ml.save_adapter(model, tmp_path)
    peer = PeftModel.from_pretrained(peer, tmp_path)
    close(model(ids), peer(torch.from_numpy(ids)))
    close(ml.merge_lora(model)(ids), peer.merge_and_unload()(torch.from_numpy(ids)))


def test_we_load_pefts_adapter(tmp_path, rng):
    model, peer, ids = fresh_peer(rng)
    peer = add_peft_lora(peer, 3, 6)
    with torch.no_grad():
        for name, p in peer.named_parameters():
            if "lora_B" in name:
                p.normal_()
    peer.save_pretrained(tmp_path)
    ml.load_adapter(model, tmp_path)
    close(model(ids), peer(torch.from_numpy(ids)))


@pytest.mark.parametrize("kind", ["cat", "linear"])
@pytest.mark.parametrize("weights", [[0.7, 0.4], [0.7, -0.4], [-1.5, -0.2]])
def test_weighted_sums_are_pefts(tmp_path, rng, kind, weights):
    from peft import PeftModel

    model, peer, ids = fresh_peer(rng)
    for name in "ab":
        ml.replace_linear_with_lora(model, 3, 5, ["q_proj", "down_proj"], rng=rng)
        for _, layer in lora_layers(model):
            layer.lora.B.data[...] = rng.standard_normal(layer.lora.B.shape)
        ml.save_adapter(model, tmp_path / name)
        ml.remove_lora(model)
    peer = PeftModel.from_pretrained(peer, tmp_path / "a", adapter_name="a")
    peer.load_adapter(tmp_path / "b", adapter_name="b")
    peer.add_weighted_adapter(["a", "b"], weights, "sum", combination_type=kind)
    peer.set_adapter("sum")
    adapters = [ml.get_adapter(ml.load_adapter(model, tmp_path / name)) for name in "ab"]
    ml.attach(model, ml.weighted_sum(adapters, weights, kind))
    close(model(ids), peer(torch.from_numpy(ids)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gpt2_of_transformers_both_ways(tmp_path, rng, tied, dtype):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=24, n_layer=3, n_head=4, tie_word_embeddings=tied
    )
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs = theirs.to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs")
    theirs = theirs.float()
    ids = rng.integers(0, 50, (2, 16))
    expected = theirs(torch.from_numpy(ids)).logits
    ours = ml.from_hf_gpt2(tmp_path / "theirs")
    close(ours(ids), expected)
    ml.to_hf_gpt2(ours, tmp_path / "ours")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    close(ours(ids), again(torch.from_numpy(ids)).logits)


def test_gpt2_of_transformers_in_shards(tmp_path, rng):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=3, n_head=4)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ids = rng.integers(0, 50, (2, 16))
    close(ml.from_hf_gpt2(tmp_path)(ids), theirs(torch.from_numpy(ids)).logits)


def test_safetensors_both_ways(tmp_path, rng):
    from safetensors.numpy import load_file, save_file

    x = rng.standard_normal((3, 4))
    tensors = {c: np.ascontiguousarray((9 * x).astype(c)) for c in ("f2", "f4", "f8", "i4", "i8")}
    tensors |= {"empty": np.zeros((0, 3)), "bool": x > 0}
    ml.save_safetensors(tmp_path / "ours", tensors | {"transposed": x.T})
    save_file(tensors, tmp_path / "theirs", {"a": "b"})
    for loaded in (load_file(tmp_path / "ours"), ml.load_safetensors(tmp_path / "theirs")):
        for name, array in tensors.items():
            assert loaded[name].dtype == array.dtype and np.array_equal(loaded[name], array)
    assert np.array_equal(load_file(tmp_path / "ours")["transposed"], x.T)


def test_bfloat16_as_torch_writes_it(tmp_path):
    from safetensors.torch import save_file

    x = torch.randn(3, 5).bfloat16()
    save_file({"x": x}, tmp_path / "x")
    assert np.array_equal(ml.load_safetensors(tmp_path / "x")["x"], x.float().numpy())


def test_initialisation_bounds_are_pytorchs():
    torch.manual_seed(0)
    ours, theirs = ml.Linear(300, 200, rng=0), torch.nn.Linear(300, 200)
    for p, q in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        assert np.abs(p.data).max() == pytest.approx(q.abs().max().item(), rel=0.02)
    swapped = torch.empty(300, 8)  # the tutorials' way round: fan-in is taken to be 8
    torch.nn.init.kaiming_uniform_(swapped, a=5**0.5)
    assert 8**-0.5 == pytest.approx(swapped.abs().max().item(), rel=0.02)
    lora = ml.LoRALayer(300, 200, 8, 8, rng=0)
    peer = add_peft_lora(torch.nn.Sequential(torch.nn.Linear(300, 200)), 8, 8)
    a = next(p for n, p in peer.named_parameters() if "lora_A" in n)
    assert np.abs(lora.A.data).max() == pytest.approx(a.abs().max().item(), rel=0.02)
