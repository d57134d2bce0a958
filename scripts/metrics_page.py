"""Write docs/metrics.md from the glossary in flowrl/runs/glossary.py."""

from pathlib import Path

from flowrl.runs.glossary import page

if __name__ == "__main__":
    Path(__file__).parents[1].joinpath("docs", "metrics.md").write_text(page())
