"""The paper's 14 benchmarks: their files, their prompts and scoring rules, and the folder of results.

`benchmarks/` has a module for each: how a question is asked, what a response answers, and what that is worth. Beside
it: reading the published files, the rules that several benchmarks share, asking a model, statistics, and the results
with the paper's own. Nothing here knows of training.
"""
