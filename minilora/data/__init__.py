"""Text: characters, corpora from the standard library, batches."""
