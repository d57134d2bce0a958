"""How fast iterations are: beside their bare parts, beside a card's rating, by operator."""
