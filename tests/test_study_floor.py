"""The study of the floor: its misses are the simulator's, and its clock is right where it can be checked by hand."""

from __future__ import annotations

from argparse import Namespace

import numpy as np
import pytest
import study_floor

from cacheroute.routing.strategies import parse_list
from cacheroute.trace import simulate


@pytest.mark.parametrize("routing, eviction", study_floor.ARMS)
def test_misses_are_those_of_the_simulator(routing: str, eviction: str) -> None:
    scores = study_floor.synthetic(2, 32, 4)
    [arm] = simulate.arms(["50%"], parse_list(routing), [eviction])
    [row] = scores.run(arm)
    missed = study_floor.misses(scores, arm)
    assert missed.shape == (study_floor.N_TOKENS - 1, 2)  # what the last token misses is in no cache before a token
    assert 0 <= row.misses - missed.sum() <= 2 * 4


def clock(*missed: list[int], ahead: int) -> float:
    """ms of a token of which a layer takes 3, its 2 experts 2 of them, the head 10, and one read 4."""
    a = Namespace(layer_ms=3.0, experts_ms=2.0, head_ms=10.0, used=2)
    return 1000 * study_floor.seconds(np.array([*missed] * (study_floor.WARM + 5)), ahead, a, 4.0)


def test_the_clock_by_hand() -> None:
    assert clock([0, 0], ahead=0) == pytest.approx(16)
    # 1 to choose, 4 to read behind 1 of compute on the other expert, 1 on the one that came; then 3, then 10
    assert clock([1, 0], ahead=0) == clock([1, 0], ahead=1) == pytest.approx(1 + 4 + 1 + 3 + 10)
    # both of the second layer: asked for at 4, there at 8 and 12; asked for at 1, there at 5 and 9
    assert clock([0, 2], ahead=0) == pytest.approx(12 + 1 + 10)
    assert clock([0, 2], ahead=1) == pytest.approx(9 + 1 + 10)
    # the first layer's read is ahead of the second's in the queue: there at 5 and 9
    assert clock([1, 1], ahead=1) == pytest.approx(9 + 1 + 10)


def test_the_table_has_every_arm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = "study_floor --layer-ms 3 --experts-ms 2 --head-ms 1 --expert-mib 1 --layers 1,2 --experts 16 --used 2"
    monkeypatch.setattr("sys.argv", command.split())
    study_floor.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 2 * 2 * len(study_floor.GB_PER_S)
    for line in lines[2:]:
        shares = [int(cell.strip(" %")) for cell in line.split("|")[-5:-1]]
        assert shares == sorted(shares) and shares[0] > 0 and shares[-1] <= 100
