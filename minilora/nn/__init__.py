"""The network: parameters, layers and a GPT, each forward with a hand-written backward."""
