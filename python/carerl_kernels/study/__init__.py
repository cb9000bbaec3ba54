"""Does it help? Guards, baselines and controls over tasks and seeds (`carerl replicate`), and its demonstration (`carerl demo`).

A cell of the study is a training run: a recipe (`train.recipe`, or one of those that `bandit`, `sft` and `merge` know), what a
method changes in it, and a seed.
"""
