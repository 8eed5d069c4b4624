"""Experiments: the comparison, pre-training, classification, counting, timing, figures."""
