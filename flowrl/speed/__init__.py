"""The speed of iterations: beside their bare parts, beside a GPU's rating, by operator."""
