"""A tiny random Llama, and its tokenizer: the 256 bytes and the two tokens of the chat template."""

import minilora as ml
from minilora.data.bpe import BPETokenizer
from minilora.files.vocabulary import GPT2, Vocabulary

BYTES = [bytes([i]) for i in range(256)]
SPECIAL = {"<|im_start|>": 256, "<|im_end|>": 257}
TOKENS = [*BYTES, *(text.encode() for text in SPECIAL)]
TOKENIZER = BPETokenizer(Vocabulary(TOKENS, {t: i for i, t in enumerate(BYTES)}, {}, [SPECIAL],
                                    SPECIAL, [GPT2], 257))


def tiny_llama(context=128):
    config = ml.LlamaConfig(vocab_size=258, d_model=32, d_ff=64, n_layers=3, n_heads=4,
                            n_kv_heads=2, context_length=context, tie_weights=True)
    model = ml.Llama(config, rng=0)
    for _, p in model.named_parameters():
        p.data[...] *= 1.0 if p.data.ndim == 1 else 4.0
    return model
