"""A user's script: a type checker must have nothing to say about it (see test_types.py)."""

import numpy as np

import minilora as ml


class Classifier(ml.Module):
    """A model of one's own, with a child that can be adapted."""

    def __init__(self, width: int, classes: int):
        self.norm = ml.LayerNorm(width)
        self.head = ml.Linear(width, classes, rng=0)

    def forward(self, x: np.ndarray) -> np.ndarray:
        return self.head(self.norm(x))

    def backward(self, dout: np.ndarray) -> np.ndarray:
        return self.norm.backward(self.head.backward(dout))


own = ml.replace_linear_with_lora(Classifier(8, 3), rank=2, alpha=4)
logits = own(np.zeros((5, 8), np.float32))
width: int = own.head.in_features
loss, dlogits = ml.cross_entropy(logits, np.zeros(5, int))
own.backward(dlogits)

model = ml.load_base("small").eval()
model = ml.load_adapter(ml.replace_linear_with_lora(model, 8, 16), "my_task").train()
context: int = model.config.context_length
layer = model.h[0].attn.q_proj
layer.lora.B.data[...] = 0.0
for name, parameter in model.named_parameters():
    print(name, parameter.shape, parameter.requires_grad)
ids = np.zeros((4, context), np.int64)
history = ml.fit(model, [(ids, ids)] * 10, ml.AdamW(model.parameters(), lr=1e-2), steps=10,
                 schedule=ml.cosine_schedule(1e-2, 10), threads=1, progress=False)
last: float = history.losses[-1]
model.lm_head = ml.Linear(model.config.d_model, 2)
base: ml.GPT = ml.remove_lora(ml.unmerge_lora(ml.merge_lora(model)))
both = ml.weighted_sum([ml.get_adapter(model)], [0.5])
tasks = ml.AdapterSet(base)
tasks.add("both", both)
mixed: np.ndarray = tasks(ids, ["both", None, "both", None])
text = ml.CharTokenizer().decode(ml.generate(base, ids[0], 20, rng=0))
assert ml.gradcheck(ml.Sequential(ml.Linear(3, 3)).astype(np.float64), np.zeros((2, 3))).passed
