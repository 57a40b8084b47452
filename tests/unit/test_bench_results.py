"""What is made of benchmark results: lengths in plots, goals on the page; and who is on which core. Pure; nothing is
measured."""

from __future__ import annotations

import json
from xml.etree import ElementTree as ET

from tests.bench import plot, results
from tests.bench.lab import placement
from tests.bench.scenario import Bar, Chart, Goal, Result, Spread

SVG = "{http://www.w3.org/2000/svg}"
RESULT = Result(
    "late",
    {"late/dnat": Spread(0.75, 0.5, 0.9), "p50/dnat": 1.02},
    {"late": {"connections_per_s": 9000}},
    [Goal("late/dnat", 0.8), Goal("p50/dnat", 1.05, at_least=False)],
    [Chart("rate", "a < b", [Bar("ours", Spread(0.5, 0.4, 0.8), ours=True, note="9,000 /s"), Bar("x & y", 2.0)], 1)],
)


def stored() -> dict[str, object]:
    """As it is read from the file."""
    found: dict[str, object] = json.loads(json.dumps(results.document(RESULT, 0)))
    return found


def test_bars_are_as_long_as_their_values() -> None:
    chart = json.loads(json.dumps(results.document(RESULT, 0)))["charts"][0]
    root = ET.fromstring(plot.draw(chart))
    short, long = (float(bar.attrib["width"]) for bar in root.iter(f"{SVG}rect"))
    assert long == plot.LONGEST and short == long / 4
    spread, reference = root.iter(f"{SVG}line")
    assert (float(spread.attrib["x1"]), float(spread.attrib["x2"])) == (plot.BEGIN + 60, plot.BEGIN + 120)
    assert float(reference.attrib["x1"]) == plot.BEGIN + long / 2
    assert [bar.attrib["class"] for bar in root.iter(f"{SVG}rect")] == ["ours", "theirs"]
    assert [text.text for text in root.iter(f"{SVG}text")] == ["a < b", "ours", "0.50", "x & y", "2.00"]


def test_a_chart_of_nothing_but_zeros_can_be_drawn() -> None:
    root = ET.fromstring(plot.draw({"title": "", "reference": None, "bars": [{**Bar("a", 0)._asdict()}]}))
    assert [bar.attrib["width"] for bar in root.iter(f"{SVG}rect")] == ["0.0"]


def test_the_page_says_which_goals_are_missed() -> None:
    rows = [row for row in results.page([stored()]).splitlines() if row.startswith("| late |")]
    assert rows == [
        "| late | `late/dnat` | at least 0.8 | 0.750 (0.500 - 0.900) | **missed** |",
        "| late | `p50/dnat` | at most 1.05 | 1.02 | met |",
    ]


def test_the_page_says_where_others_used_the_machine() -> None:
    (row, *_) = [
        row for row in results.page([results.document(RESULT, 999)]).splitlines() if row.startswith("| late |")
    ]
    assert row.endswith("| **missed**, disturbed |")


def test_a_document_says_where_it_was_measured() -> None:
    found = results.document(RESULT, 0)
    assert {"cpu", "cores", "memory_mb", "kernel", "system", "niceness", "cores_of_others"} == set(found["machine"])
    assert {"python", "nft", "steerd"} <= set(found["versions"])
    assert found["date"].endswith("+00:00")


def test_clients_have_cores_of_their_own_where_there_are_enough() -> None:
    assert placement([0, 1, 2, 3, 4, 5], 64) == ([4, 5], [0, 1, 2, 3])
    assert placement([0, 1], 64) == ([0, 1], [0, 1])
    assert placement([0, 1, 2, 3], 1) == ([0], [0])


def test_what_others_used_is_what_was_not_ours() -> None:
    before = results.Used(at=10, cpu=100, ours=5)
    assert results.cores_of_others(before, results.Used(at=20, cpu=118, ours=8)) == 1.5
    assert results.cores_of_others(before, results.Used(at=20, cpu=101, ours=8)) == 0
