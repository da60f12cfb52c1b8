"""How deep the greedy decomposition has to go: steps and tolerances against quality."""
