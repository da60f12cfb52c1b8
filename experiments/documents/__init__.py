"""What `experiments.render` puts into README and docs: tables, pictures, quotes."""
