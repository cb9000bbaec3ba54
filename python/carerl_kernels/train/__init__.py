"""`carerl train`: a YAML recipe becomes model, domains, guard, sampler and trainer, on one process or on those of torchrun.

From Python: `with open_run(load_recipe("small.yaml")) as run: run.train()` (`train.recipe`, `train.run`). Nothing is imported
here, for the command line to start quickly.
"""
