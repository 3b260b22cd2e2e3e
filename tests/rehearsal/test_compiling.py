"""Update and attack through torch.compile, without a compiler: no break, no graph after the first epoch."""

import json
from pathlib import Path

import pytest
from rehearsal import parts

CASES = """
    import json, sys
    sys.path.insert(0, sys.argv[1])
    from rehearsal.compiling import case
    for each in json.loads(sys.argv[2]):
        print(json.dumps(case(*each)))
"""
GROWS, MOVES = "a radius that grows", "statistics of the batch"


def compiled(run_script, *cases):
    """What the compiler made of each (objective, network); checked where all are alike."""
    tests = Path(__file__).parents[1]
    found = [
        json.loads(line) for line in run_script(CASES, str(tests), json.dumps(cases)).splitlines()
    ]
    assert len(found) == len(cases)
    for one in found:
        assert not one["failed"] and not one["breaks"], one
        assert one["graphs"][0] == one["graphs"][2] > 0, (
            one
        )  # a graph for each of the two sizes, then no more
        assert not one["draws"], (
            one
        )  # random numbers come from outside the graphs that are replayed
        assert one["gap"] < 1e-4, one  # also where the next replay overwrites outputs
    return found


def test_aloe_is_two_graphs_for_each_size_of_batch(run_script):
    (found,) = compiled(run_script, ("ALOE",))
    assert found["graphs"] == [4, 4, 4] and found["replays"] == 9


@pytest.mark.slow
def test_each_objective_compiles_once(run_script):
    for one in compiled(run_script, *[(name,) for name in parts.OBJECTIVES]):
        print(one)


@pytest.mark.slow
def test_each_network_compiles_once(run_script):
    rules = {"ccu_model": "CCU"}
    for one in compiled(run_script, *[(rules.get(name, "ALOE"), name) for name in parts.NETWORKS]):
        print(one)
