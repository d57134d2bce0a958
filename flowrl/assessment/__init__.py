"""Base models and finished runs evaluated side by side: images, numbers with intervals, and one page."""
