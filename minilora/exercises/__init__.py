"""The exercises: what checks an answer, what grades a file, and one module for each."""
