"""READMEs whose numbers come from records: `<!-- begin STUDY/PIECE -->...<!-- end -->` is filled,
the rest is prose.

A piece is a whole table (`methods/main`) or one cell of one (`methods/main/flow_dppo/KL`), which a
sentence may quote.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowrl.errors import UserError
from flowrl.report.tables import Table
from flowrl.studies import ratio_noise_tables
from flowrl.studies.figures import CAPTIONS, figure_names
from flowrl.studies.plan import Study
from flowrl.studies.tables import cells, status, tables

BLOCK = re.compile(r"<!-- begin ([^>]+?) -->.*?<!-- end -->", re.DOTALL)
NOTHING = "not run yet"


@dataclass(frozen=True)
class Pieces:
    """What a README can show of a study, by name; one that is not complete may yet get others."""

    texts: Mapping[str, str]
    is_complete: bool


def fill(text: str, pieces: Mapping[str, Pieces]) -> str:
    """The text with every block of the given studies filled; `pieces` maps studies to theirs.

    Raises UserError for a piece that a complete study does not have.
    """

    def replaced(match: re.Match[str]) -> str:
        name = match[1]
        study = name.split("/", 1)[0]
        if study not in pieces:
            return match[0]
        own = pieces[study]
        if name not in own.texts and own.is_complete:
            raise UserError(
                f"{name}: study {study} has no such piece; it has {', '.join(sorted(own.texts))}"
            )
        body = own.texts.get(name, f"_{NOTHING}_")
        is_block = name.count("/") == 1
        return f"<!-- begin {name} -->" + (f"\n{body}\n" if is_block else body) + "<!-- end -->"

    return BLOCK.sub(replaced, text)


def pieces(study: Study, results: Mapping[str, Any]) -> Pieces:
    """Everything that a README can show of a study: of one without results, its status alone."""
    found = {f"{study.name}/status": status(study, results)}
    if not results["runs"] and not results.get("simulation"):
        return Pieces(found, is_complete=False)
    for table in all_tables(study, results):
        found[f"{study.name}/{table.stem}"] = body(table)
        found |= cells(study.name, table)
    names = figure_names(study, results)
    kinds = {name: study.report["figures"][name]["kind"] for name in names}
    found[f"{study.name}/figures"] = "\n\n".join(
        f"![{name}](figures/{name}.svg)\n\n*{name.replace('_', ' ').capitalize()}. "
        f"{CAPTIONS[kinds[name]]}*"
        for name in names
    )
    # The first one by its path from the front page.
    found[f"{study.name}/front"] = (
        f"![{names[0]}](experiments/{study.name}/figures/{names[0]}.svg)" if names else ""
    )
    return Pieces(found, is_complete=len(results["runs"]) >= study.num_runs)


def all_tables(study: Study, results: Mapping[str, Any]) -> list[Table]:
    """Of the runs, and of what was computed without any."""
    own = ratio_noise_tables.tables(results) if results.get("simulation") else []
    return own + (tables(study, results) if results["runs"] else [])


def body(table: Table) -> str:
    """A table with its note above, without a heading."""
    return table.markdown().split("\n\n", 1)[1].strip()


def page(study: Study, results: Mapping[str, Any]) -> str:
    """All pieces of a study on one page, for runs that are not its record."""
    parts = [f"# {study.name}", status(study, results)]
    if results["runs"] or results.get("simulation"):
        parts += [table.markdown() for table in all_tables(study, results)]
        parts.append(pieces(study, results).texts[f"{study.name}/figures"])
    return "\n\n".join(parts) + "\n"


def samples_page(study: str, names: list[str], seed: int, score: str) -> str:
    """The page of samples: one grid a condition, by rule; `score` says what the number under a
    picture is.
    """
    rule = (
        "The first prompts of the held-in evaluation set from its fixed noise, before and after "
        "training; of each "
        f"condition the run of seed {seed}. Nothing is picked. The number is the image's {score}."
    )
    grids = "\n\n".join(f"## {name}\n\n![{name}](samples/{slug(name)}.png)" for name in names)
    return f"# Samples: {study}\n\n{rule}\n\n{grids}\n"


def slug(name: str) -> str:
    """A condition as a file name."""
    return re.sub(r"[^\w.+-]+", "_", name)
