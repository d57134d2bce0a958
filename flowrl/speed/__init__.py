"""How fast iterations are: beside their bare parts, beside a GPU's rating, by operator."""
