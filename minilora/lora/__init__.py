"""Low-rank adaptation: start with `layer`; then wrapping, and adapters apart from a model."""
