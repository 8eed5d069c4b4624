"""Text in and out: characters, corpora from the standard library, batches, generation."""
