"""Low-rank adaptation. Start with `layer`; then come wrapping, and adapters on their own."""
