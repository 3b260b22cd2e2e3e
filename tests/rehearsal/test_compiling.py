"""Update and attack through torch.compile, without a compiler: no break, no graph after the first epoch."""

import json
from pathlib import Path

import pytest
from rehearsal import parts

CASE = """
    import json, sys
    sys.path.insert(0, sys.argv[1])
    from rehearsal.compiling import case
    print(json.dumps(case(*sys.argv[2:])))
"""


def compiled(run_script, *names):
    """What the compiler made of an objective, on its own network or another one."""
    one = json.loads(run_script(CASE, str(Path(__file__).parents[1]), *names))
    assert not one["failed"] and not one["breaks"], one
    assert one["graphs"][0] == one["graphs"][2] > 0, one  # for each of the two sizes, then no more
    assert not one["draws"], one  # random numbers come from outside the graphs that are replayed
    assert one["gap"] < 1e-4, one  # also where the next replay overwrites outputs
    return one


def test_aloe_is_two_graphs_for_each_size_of_batch(run_script):
    found = compiled(run_script, "ALOE")
    assert found["graphs"] == [4, 4, 4] and found["replays"] == 9


@pytest.mark.slow
@pytest.mark.parametrize("rule", parts.OBJECTIVES)
def test_each_objective_compiles_once(rule, run_script):
    compiled(run_script, rule)


@pytest.mark.slow
@pytest.mark.parametrize("network", parts.NETWORKS)
def test_each_network_compiles_once(network, run_script):
    compiled(run_script, "CCU" if network == "ccu_model" else "ALOE", network)
