"""Each kept row of the leaderboard holds what its numbers need, and the page shows them all."""

import html
import json
import re
from pathlib import Path

import pytest
import robustood_leaderboard as board

from experiments import leaderboard
from robustood import artefacts, metrics
from robustood.evaluate import StandardReport
from robustood.metrics import Estimate

VERSIONS = {"standard-1"}  # those that the table compares
ROOT = Path(__file__).parents[1]
each_row = pytest.mark.parametrize("name", board.names())


def faults(text):
    """What forbids to show a report, from its JSON."""
    report = StandardReport.from_json(text)
    found = []
    if report.version not in VERSIONS:
        found.append(f"unknown protocol {report.version!r}")
    names = {row["set"] for row in report["both"].rows}
    wanted = {"weights", "in", *(f"out {name}" for name in names)}
    if missing := wanted - {k for k, v in report.sha256.items() if re.fullmatch("[0-9a-f]{64}", v)}:
        found.append(f"no sha256 of {', '.join(sorted(missing))}")
    for side, each in report.reports.items():
        for row in each.rows:
            where = f"{side}, {row['set']}"
            if not {"in", "in (clean)", row["set"]} <= each.scores.keys():
                found.append(f"{where}: no scores")
                continue
            again = metrics.auroc(each.scores["in"], each.scores[row["set"]])
            if abs(again - row["auroc"].value) > 1e-9:
                found.append(
                    f"{where}: AUROC {row['auroc'].value:.4f}, the scores give {again:.4f}"
                )
            rates = {k: v for k, v in row.items() if isinstance(v, Estimate)}
            found += [
                f"{where}: {k} {v} is no interval"
                for k, v in rates.items()
                if not 0 <= v.low <= v.value <= v.high <= 1
            ]
    return found + order(report, names)


def order(report, names):
    """An attack that helps the detector was no attack."""
    return [
        f"{name}: {stronger} attacked gives more than {weaker}"
        for name in names
        for weaker, stronger in (("none", "in"), ("none", "out"), ("in", "both"), ("out", "both"))
        if report[stronger][name]["auroc"].value > report[weaker][name]["auroc"].value + 1e-9
    ]


def test_there_are_rows_and_each_shipped_one_is_kept():
    assert {leaderboard.PREFIX + name for name in leaderboard.ROWS} <= set(board.names())
    assert leaderboard.PREFIX == board.PREFIX


@each_row
def test_a_row_is_whole(name):
    assert not faults(artefacts.find("results", name).read_text("utf-8"))
    settings = StandardReport.from_json(artefacts.find("results", name))["both"].settings
    assert settings["detector"] and settings["data"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.update(version="mine-1"), "unknown protocol 'mine-1'"),
        (lambda r: r["sha256"].pop("weights"), "no sha256 of weights"),
        (lambda r: r["reports"]["both"]["rows"][0]["auroc"].update(value=0.99), "the scores give"),
        (lambda r: r["reports"]["in"]["rows"][0]["fpr"].update(low=0.999), "fpr .* is no interval"),
        (lambda r: r["reports"]["out"].pop("scores"), "out, letters: no scores"),
        (lambda r: r["reports"].update({"none": r["reports"]["both"], "both": r["reports"]["none"]}),
         "letters: both attacked gives more than in"),
    ],
)  # fmt: skip
def test_a_row_that_was_changed_is_refused(change, said):
    name = f"{leaderboard.PREFIX}digits_aloe_msp"
    record = json.loads(artefacts.find("results", name).read_text("utf-8"))
    change(record)
    assert re.search(said, "; ".join(faults(json.dumps(record))))


def test_the_table_shows_every_row_most_robust_first():
    text = board.table()
    assert text.count("<tr>") == 1 + sum(
        len(StandardReport.from_json(artefacts.find("results", name))["both"].rows)
        for name in board.names()
    )
    lines = [re.findall("<td[^>]*>(.*?)</td>", line) for line in text.split("<tr>")[2:]]
    assert all(len(line) == len(board.HEADS) for line in lines)
    assert [html.unescape(each) for each in re.findall('<th scope="col">(.*?)</th>', text)] == [
        *board.HEADS
    ]
    both = [float(line[board.HEADS.index("both attacked")].split()[0]) for line in lines]
    assert both == sorted(both, reverse=True)


@pytest.mark.parametrize(
    ("within", "short"),
    [("Linf(eps=0.1, box=[0, 1])", "Linf 0.1"), ("Spatial(10, 1)", "Spatial(10, 1)"),
     (f"L2(eps={128 / 255}, box=(0, 1))", "L2 128/255")],
)  # fmt: skip
def test_a_set_is_written_in_short(within, short):
    assert board.radius(within) == short


def test_the_script_and_the_page_are_there():
    script = (ROOT / "book/_static/leaderboard.js").read_text("utf-8")
    assert 'createElement("button")' in script and "aria-sort" in script and "http" not in script
    assert "```{leaderboard}" in (ROOT / "book/leaderboard.md").read_text("utf-8")
    assert "- file: book/leaderboard" in (ROOT / "_toc.yml").read_text("utf-8")
