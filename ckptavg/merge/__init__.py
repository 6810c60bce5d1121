"""Plan and compute averages: coefficients, the role of each tensor, the loop over chunks."""
