"""The commands of `minilora`: for each, a function that adds its options, and one that runs it."""
