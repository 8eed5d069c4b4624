"""The exercises, one module each; the code that checks an answer; the grader."""
