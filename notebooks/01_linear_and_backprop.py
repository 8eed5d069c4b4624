# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1. A linear layer and its gradients, by hand
#
# Everything in this library rests on one layer, $y = xW + b$, and on three lines that go
# backwards through it. In this notebook you will
#
# - write the layer and derive its three gradients with the chain rule,
# - check them against central differences, and see what a mistake looks like in the report,
# - see what *freezing* a weight saves and what it does not,
# - train a linear map, then a two-layer network, and meet AdamW, the optimizer of all that follows.
#
# You need: matrix products, the chain rule, a little NumPy.

# %%
# %matplotlib inline
import numpy as np

import minilora as ml
from minilora.lab import plots

rng = np.random.default_rng(0)

# %% [markdown]
# ## The layer
#
# Letters: $N$ rows (examples), $n$ inputs, $m$ outputs.
#
# $$ y_{ij} = \sum_k x_{ik} W_{kj} + b_j \qquad x: (N, n),\; W: (n, m),\; b: (m,),\; y: (N, m) $$


# %%
def linear(x, W, b):
    return x @ W + b


N, n, m = 5, 4, 3
x, W, b = rng.standard_normal((N, n)), rng.standard_normal((n, m)), rng.standard_normal(m)
y = linear(x, W, b)
print("x", x.shape, " W", W.shape, " b", b.shape, " y", y.shape)

# %% [markdown]
# ## What a gradient is
#
# Training needs one number to make small, the loss $L$. Somebody above this layer hands us the
# derivative of $L$ with respect to every entry of $y$, $G_{ij} = \partial L / \partial y_{ij}$;
# in code it is called `dout`. The chain rule does the rest. An entry $W_{kj}$ appears in $y_{ij}$
# for every row $i$, each time multiplied by $x_{ik}$, so
#
# $$ \frac{\partial L}{\partial W_{kj}} = \sum_i x_{ik} G_{ij} \;\Rightarrow\; dW = x^\top G $$
#
# $b_j$ appears once in every row, multiplied by 1:
#
# $$ \frac{\partial L}{\partial b_j} = \sum_i G_{ij} \;\Rightarrow\; db = \text{sum of } G
# \text{ over its rows} $$
#
# and $x_{ik}$ appears in every output $j$ of its own row, multiplied by $W_{kj}$:
#
# $$ \frac{\partial L}{\partial x_{ik}} = \sum_j G_{ij} W_{kj} \;\Rightarrow\; dx = G W^\top $$
#
# A good habit: each gradient has the shape of what it is the gradient of, and often only one
# way of multiplying the pieces gives that shape.


# %%
def linear_backward(dout, x, W):
    dW = x.T @ dout
    db = dout.sum(axis=0)
    dx = dout @ W.T
    return dW, db, dx


dout = rng.standard_normal((N, m))
dW, db, dx = linear_backward(dout, x, W)
print("dW", dW.shape, " db", db.shape, " dx", dx.shape)

# %% [markdown]
# ## Trust nothing: central differences
#
# The definition of a derivative gives a slow but simple second opinion. Move one entry up and
# down by $h$ and look at what the loss does:
#
# $$ \frac{\partial L}{\partial w} = \frac{L(w + h) - L(w - h)}{2h} + O(h^2) $$
#
# As a loss take $L = \sum_{ij} G_{ij} y_{ij}$: its derivative with respect to $y$ is just $G$.


# %%
def numerical(f, array, h=1e-5):
    slopes = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        old = array[index]
        array[index] = old + h
        above = f()
        array[index] = old - h
        below = f()
        array[index] = old
        slopes[index] = (above - below) / (2 * h)
    return slopes


def loss():
    return (dout * linear(x, W, b)).sum()


for name, array, gradient in [("W", W, dW), ("b", b, db), ("x", x, dx)]:
    error = np.abs(numerical(loss, array) - gradient).max()
    print(f"d{name}: largest difference {error:.1e}")
    assert error < 1e-8

# %% [markdown]
# Differences of about $10^{-10}$: that is round-off, not mathematics. How small should $h$ be?
# Too large, and the $O(h^2)$ term shows; too small, and the subtraction of two nearly equal
# numbers eats the digits. The valley is deep in float64, and in float32 too shallow for a
# tolerance of $10^{-6}$, which is why gradient checks are done in float64. (For a linear layer the
# $O(h^2)$ term is zero, so we use a cube to see both sides.)

# %%
steps = np.logspace(-10, -1, 28)
curves = {}
for dtype in (np.float64, np.float32):
    w = dtype(0.7)
    slope = [((w + dtype(h)) ** 3 - (w - dtype(h)) ** 3) / dtype(2 * h) for h in steps]
    error = np.abs(np.array(slope) / (3 * 0.7**2) - 1)
    curves[np.dtype(dtype).name] = steps, np.maximum(error, 1e-16)
plots.lines(curves, "step h", "relative error of the slope", xscale="log", yscale="log")

# %% [markdown]
# ## The same in the library
#
# `ml.Linear` is those two functions in one object: `forward` keeps what `backward` needs,
# `backward` *adds* to `.grad` and returns `dx`. Adding matters: when a weight is used twice,
# the chain rule says that its gradients sum up.

# %%
layer = ml.Linear(n, m, dtype=np.float64, rng=0)
layer.weight.data[...], layer.bias.data[...] = W, b
assert np.allclose(layer(x), y)
assert np.allclose(layer.backward(dout), dx)
assert np.allclose(layer.weight.grad, dW) and np.allclose(layer.bias.grad, db)

layer(x)
layer.backward(dout)
print("a second pass doubles the gradient:", np.allclose(layer.weight.grad, 2 * dW))
layer.zero_grad()
print("after zero_grad it is", layer.weight.grad)

# %% [markdown]
# The pair has rules that save you from silent mistakes. One forward, one backward:

# %%
layer(x)
layer.backward(dout)
try:
    layer.backward(dout)
except RuntimeError as error:
    print(error)

# %% [markdown]
# `ml.gradcheck` is the loop above for any module. A wrong backward is pointed at, entry by entry.
# The number it prints is the largest error in an array, relative to the largest gradient there.
# Here is a popular mistake, the mean over the rows where the sum belongs:

# %%
print(ml.gradcheck(layer, x), "\n")


class MeanBias(ml.Linear):
    def backward(self, dout):
        dx = super().backward(dout)
        self.bias.grad = dout.mean(axis=0)
        return dx


wrong = MeanBias(n, m, dtype=np.float64, rng=0)
report = ml.gradcheck(wrong, x)
print(report)
assert not report.passed and ml.gradcheck(layer, x).passed

# %% [markdown]
# Divide what was expected by what it got: 5, the number of rows. The report does not only say
# *that* something is wrong; a ratio like this often says *what*.
#
# ## Freezing
#
# LoRA freezes $W$. Of the two products in backward $dW$ falls away then, and the layer need not
# hold on to $x$ for it. But $dx$ is still needed, because the layers below want their gradient: a
# frozen layer is not a wall.

# %%
layer.freeze()
layer.zero_grad()
layer(x)
print("kept of x for backward:", layer._cache[0])
print("dx still right:", np.allclose(layer.backward(dout), dx), " weight.grad:", layer.weight.grad)

# %% [markdown]
# ## Gradient descent on a small problem
#
# Data from a known map plus noise; start from random weights; step against the gradient. The loss
# is the mean square, so $G = 2 (y - t) / (N m)$.

# %%
W_true, b_true = rng.standard_normal((4, 3)), rng.standard_normal(3)
X = rng.standard_normal((200, 4))
T = X @ W_true + b_true + 0.1 * rng.standard_normal((200, 3))


def train(model, X, T, optimizer, steps):
    losses = []
    for _ in range(steps):
        residual = model(X) - T
        losses.append(float((residual**2).mean()))
        optimizer.zero_grad()
        model.backward(2 * residual / residual.size)
        optimizer.step()
    return losses


curves = {}
for lr in (0.03, 0.3, 1.0):
    model = ml.Linear(4, 3, dtype=np.float64, rng=0)
    curves[f"lr {lr:g}"] = range(100), train(model, X, T, ml.SGD(model.parameters(), lr), 100)
    print(f"lr {lr:4g}: final loss {curves[f'lr {lr:g}'][1][-1]:.4f}, "
          f"largest error in W {np.abs(model.weight.data - W_true).max():.3f}")
assert abs(curves["lr 1"][1][-1] - 0.01) < 0.002  # what is left is the noise: 0.1 squared
plots.lines(curves, "step", "mean square error", yscale="log")

# %% [markdown]
# The two faster runs end just below 0.01, the variance of the noise: what is left is noise. (*Just
# below*, since 15 fitted numbers also soak up a little of it.)
#
# ## AdamW in five lines
#
# Plain descent takes large steps where the gradient is large. Adam divides that out: it keeps two
# running means for every parameter, $m$ of the gradient and $v$ of its square, and steps along $m /
# \sqrt{v}$. Where the gradient is steady, that is 1 or -1, and the number moves by the learning
# rate, whatever the gradient's scale. The W stands for weight decay: a small shrinking of the
# weights, apart from the gradient. Both means start at zero, and the divisions by $1 - b^t$ make up
# for that.

# %%
w, g = np.array([1.0, -2.0]), np.array([0.001, 30.0])
lr, b1, b2, eps, decay = 0.1, 0.9, 0.999, 1e-8, 0.01
parameter = ml.Parameter(w)
optimizer = ml.AdamW([parameter], lr=lr, weight_decay=decay)
mean, square = np.zeros(2), np.zeros(2)
for t in (1, 2, 3):
    mean = b1 * mean + (1 - b1) * g
    square = b2 * square + (1 - b2) * g**2
    step = (mean / (1 - b1**t)) / (np.sqrt(square / (1 - b2**t)) + eps)
    w = w - lr * decay * w - lr * step
    print(f"step {t}: gradients {g}, moved by {-lr * step}")

    parameter.grad = g.copy()
    optimizer.step()
    assert np.allclose(parameter.data, w)

# %% [markdown]
# Gradients that differ by a factor of 30,000, and steps of one size. But these gradients are the
# same in every step. Where the sign changes from batch to batch, $m$ is small beside $\sqrt{v}$:

# %%
signs = np.random.default_rng(1).choice([-1.0, 1.0], 1000)
size = {}
for name, gradients in (("steady", np.full(1000, 30.0)), ("of random sign", 30 * signs)):
    parameter = ml.Parameter(np.zeros(1))
    optimizer = ml.AdamW([parameter], lr=lr, weight_decay=0.0)
    places = [0.0]
    for gradient in gradients:
        parameter.grad = np.array([gradient])
        optimizer.step()
        places.append(float(parameter.data[0]))
    steps_taken = np.diff(places)[100:] / lr  # without the beginning
    size[name] = np.sqrt((steps_taken**2).mean())
    print(f"gradients {name:14}: a step is {size[name]:.2f} of the learning rate (root mean "
          f"square), and 1000 steps lead {abs(places[-1]) / lr:.0f} learning rates away")
assert np.isclose(size["steady"], 1.0, atol=1e-6)
assert np.isclose(size["of random sign"], np.sqrt((1 - b1) / (1 + b1)), rtol=0.1)

# %% [markdown]
# $m$ is a mean of about the last ten gradients, and signs that have nothing to do with each other
# cancel in it: what is left has the size $\sqrt{(1 - b_1) / (1 + b_1)} = 0.23$. Real gradients are
# something in between, so the learning rate is the *most* that a number usually moves. Adam's
# price: two more numbers for every parameter that is trained. Remember that price for notebook 4.
#
# ## Two layers
#
# Now two layers with a nonlinear function, GELU, between them. Backward runs through the modules
# in reverse, each handing its `dx` down as the next one's `dout`. That is all of backpropagation.

# %%
x_axis = np.linspace(-3, 3, 200)[:, None]
wave = np.sin(2 * x_axis) + 0.3 * x_axis
net = ml.Sequential(ml.Linear(1, 32, rng=1), ml.GELU(), ml.Linear(32, 1, rng=2)).astype(np.float64)
assert ml.gradcheck(net, x_axis).passed
start = net(x_axis)
losses = train(net, x_axis, wave, ml.AdamW(net.parameters(), lr=0.02, weight_decay=0.0), 600)
print(net)
print(f"{net.num_parameters()} parameters, loss {losses[0]:.3f} -> {losses[-1]:.5f}")
assert losses[-1] < 0.01
figure = plots.lines(
    {"before training": (x_axis, start), "after 600 steps": (x_axis, net(x_axis))}, "x", "y"
)
figure.axes[0].plot(x_axis, wave, color="grey", linewidth=7, alpha=0.3, zorder=1, label="target")
figure.axes[0].legend(frameon=False)
figure

# %% [markdown]
# ## Questions
#
# 1. Why is `db` a sum and not a mean? Where would a mean over the batch come in?
# 2. The batch is doubled by repeating every row. How do `dW`, `db` and `dx` change, if the loss is
#    a sum? If it is a mean?
# 3. A layer is frozen, and so is everything below it. Which of the three gradients can be left out?
# 4. `W` is (1000, 1000) and there are 64 rows. How many multiplications cost $y$, $dW$ and $dx$?
#    What share of the three does freezing save?
# 5. Learning rate 1.0 worked above. What happens at 3.0? Find the largest that converges. (Hint:
#    the error of $W$ and $b$ together is multiplied in each step by $I - \eta H$, with $H = 2
#    X_1^\top X_1 / (N m)$ and $X_1$ the data `X` with a column of ones. When does that shrink?)
