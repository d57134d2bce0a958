"""READMEs whose numbers come from records: `<!-- begin STUDY/PIECE -->...<!-- end -->` is filled,
the rest is prose.

A piece is a whole table (`methods/main`) or one cell of one (`methods/main/flow_dppo/KL`), which a
sentence may quote.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from flowrl.errors import UserError
from flowrl.report.tables import Table
from flowrl.studies.figures import CAPTIONS, figure_names
from flowrl.studies.plan import Study
from flowrl.studies.ratio_noise.tables import tables as simulated_tables
from flowrl.studies.record import Results
from flowrl.studies.tables import cells, status, tables

BLOCK = re.compile(r"<!-- begin ([^>]+?) -->.*?<!-- end -->", re.DOTALL)
NOTHING = "not run yet"


@dataclass(frozen=True)
class Pieces:
    """The pieces that a README can show of a study, by name; a study that is not complete may yet
    get others.
    """

    texts: Mapping[str, str]
    is_complete: bool


def fill(text: str, pieces: Mapping[str, Pieces]) -> str:
    """Return the text with every block of the given studies filled; `pieces` maps studies to
    theirs.

    Raises UserError for a piece that a complete study does not have.
    """

    def replaced(match: re.Match[str]) -> str:
        name = match[1]
        study = name.split("/", 1)[0]
        # Blocks of a study that is not rendered this time stay as they are.
        if study not in pieces:
            return match[0]
        texts = pieces[study].texts
        if name not in texts and pieces[study].is_complete:
            known = ", ".join(sorted(texts))
            raise UserError(f"{name}: study {study} has no such piece; it has {known}")
        body = texts.get(name, f"_{NOTHING}_")
        if name.count("/") == 1:  # a whole table, not a word in a sentence
            body = f"\n{body}\n"
        return f"<!-- begin {name} -->{body}<!-- end -->"

    return BLOCK.sub(replaced, text)


def pieces(study: Study, results: Results) -> Pieces:
    """Make all that a README can show of a study: of one without results, its status alone."""
    texts = {f"{study.name}/status": status(study, results)}
    if not results["runs"] and not results.get("simulation"):
        return Pieces(texts, is_complete=False)
    for table in all_tables(study, results):
        texts[f"{study.name}/{table.stem}"] = body(table)
        texts |= cells(study.name, table)
    names = figure_names(study, results)
    figures = [_shown(study, name) for name in names]
    texts[f"{study.name}/figures"] = "\n\n".join(figures)
    texts[f"{study.name}/front"] = ""
    if names:
        # The first one by its path from the page of all studies.
        path = f"{study.name}/figures/{names[0]}.svg"
        texts[f"{study.name}/front"] = f"![{names[0]}]({path})"
    return Pieces(texts, is_complete=len(results["runs"]) >= study.num_runs)


def _shown(study: Study, figure: str) -> str:
    """Write a figure with its title and caption, by its path from the study's README."""
    title = figure.replace("_", " ").capitalize()
    kind = study.report["figures"][figure]["kind"]
    return f"![{figure}](figures/{figure}.svg)\n\n*{title}. {CAPTIONS[kind]}*"


def all_tables(study: Study, results: Results) -> list[Table]:
    """Make the tables of what was computed without any run, and those of the runs."""
    made: list[Table] = []
    if results.get("simulation"):
        made += simulated_tables(results)
    if results["runs"]:
        made += tables(study, results)
    return made


def body(table: Table) -> str:
    """Return a table with its note above, without a heading."""
    _, without_heading = table.markdown().split("\n\n", 1)
    return without_heading.strip()


def page(study: Study, results: Results) -> str:
    """Write all pieces of a study on one page, for runs that are not its record and fill no
    README.
    """
    paragraphs = [f"# {study.name}", status(study, results)]
    if results["runs"] or results.get("simulation"):
        paragraphs += [table.markdown() for table in all_tables(study, results)]
        paragraphs.append(pieces(study, results).texts[f"{study.name}/figures"])
    return "\n\n".join(paragraphs) + "\n"


def samples_page(study: str, names: list[str], seed: int, score: str) -> str:
    """Write the page of samples: one grid a condition, by rule; `score` says what the number under
    a picture is.
    """
    rule = (
        "The first prompts of the held-in evaluation set from its fixed noise, before and after "
        f"training; of each condition the run of seed {seed}. Nothing is picked. The number is the "
        f"image's {score}."
    )
    paragraphs = [f"# Samples: {study}", rule]
    for name in names:
        paragraphs += [f"## {name}", f"![{name}](samples/{slug(name)}.png)"]
    return "\n\n".join(paragraphs) + "\n"


def slug(name: str) -> str:
    """Return a condition as a file name."""
    return re.sub(r"[^\w.+-]+", "_", name)
