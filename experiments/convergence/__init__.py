"""The convergence study: hard matrices and layers, swept over bases and seeds."""
