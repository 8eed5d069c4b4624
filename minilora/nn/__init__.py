"""The network: parameters, layers, a GPT, each forward beside its hand-written backward."""
