"""What the machine tells, from files made by hand."""

from pathlib import Path

import pytest

from llama2.compiled import make_pool
from llama2.cpu import available
from llama2.evaluate import machine


def test_energy_counts_packages_and_their_wrap(tmp_path: Path) -> None:
    for name, value in (("intel-rapl:0", 900), ("intel-rapl:1", 100), ("intel-rapl:0:0", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("999\n")
    energy = machine.Energy(tmp_path)
    assert energy.measurable
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100\n")  # from 900 over 999: 200
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("150\n")
    assert energy.used() == pytest.approx(250e-6)
    assert energy.used() == 0


def test_no_energy(tmp_path: Path) -> None:
    assert not machine.Energy(tmp_path).measurable and machine.Energy(tmp_path).used() is None


def test_others_share(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    load = machine.Load(stat)
    assert load.taken() is None
    stat.write_text("cpu 0 0 0 0 0 0 0 0 0 0\n" + "".join(f"cpu{i} 0 0 0 0 0 0 0 0 0 0\n" for i in range(256)))
    load = machine.Load(stat)
    stat.write_text("".join(f"cpu{i} 50000 0 0 50000 0 0 0 0 0 0\n" for i in range(256)))
    assert load.taken() == pytest.approx(0.5, abs=0.02)  # half busy, and this process took next to nothing


@pytest.mark.skipif(not available(), reason="needs the compiled module")
def test_limits() -> None:
    found = machine.limits(make_pool(1), rounds=1)
    assert found is not None and found.read > 1e8 and min(found.operations) > 1e8


def test_description() -> None:
    told = machine.describe()
    assert told["threads"] >= 1 and told["processor"] and machine.peak_memory()
