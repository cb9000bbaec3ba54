"""Small models and verifiable tasks that need no download, for recipes, examples, tests and the study."""
