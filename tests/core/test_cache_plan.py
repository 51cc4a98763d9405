from __future__ import annotations

import pytest

from dacc.core.cache_plan import BlockRange, CachePlan, ModuleUnit, UnetCut, UnitMacs
from dacc.core.config import build_config
from dacc.core.errors import ConfigError
from dacc.core.schedule_id import ScheduleId

GRID = ScheduleId(scheduler="DDIMScheduler", config_sha256="0", timesteps=(3.0, 2.0, 1.0, 0.0))
CUT = UnetCut(id="deep", block=0, layer=1)


def plan(**fields):
    given = {
        "class_name": "UNet2DModel",
        "config_sha256": "0",
        "weights": "0",
        "schedule": GRID,
        "units": (CUT,),
        "codes": {"deep": "CRCR"},
        "macs": UnitMacs(full=10, units={"deep": 6}),
    }
    return build_config(CachePlan, **{**given, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"codes": {"deep": "CRC"}}, "3 calls, the grid has 4"),
        ({"codes": {"deep": "RRCR"}}, "nothing to reuse"),
        ({"codes": {"deep": "CRXR"}}, "codes that are not known"),
        ({"codes": {"shallow": "CRCR"}}, "the units are"),
        ({"macs": UnitMacs(full=1, units={})}, "macs.units"),
        ({"units": (CUT, CUT)}, "same id"),
        ({"units": ()}, "units"),
        ({"extra": 1}, "no field 'extra'"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        plan(**fields)


def test_a_range_needs_blocks():
    with pytest.raises(ConfigError, match="blocks 3 to 3 are none"):
        build_config(BlockRange, id="body", stacks=("blocks",), first=3, end=3)


def test_every_part_of_a_plan_counts_in_its_hash():
    other_macs = UnitMacs(full=10, units={"deep": 5})
    plans = [plan(), plan(codes={"deep": "CRRR"}), plan(weights="1"), plan(rule="exact"), plan(macs=other_macs)]
    assert len({found.sha256() for found in plans}) == len(plans)
    assert plan().sha256() == plan().sha256()


def test_a_plan_reads_itself_back():
    units = (CUT, ModuleUnit(id="m", path="a.b"), BlockRange(id="body", stacks=("blocks",), first=1, end=2))
    written = plan(
        units=units,
        codes={unit.id: "CRCR" for unit in units},
        macs=UnitMacs(full=1, units={unit.id: 0 for unit in units}),
    )
    read = CachePlan.model_validate_json(written.model_dump_json())
    assert read == written
    assert read.sha256() == written.sha256()
