"""The path that the guide writes, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from small_world import QUICK

from stepwell import cli
from stepwell.config.commands import CompressConfig
from stepwell.measure.cost import Epochs
from stepwell.paths.begin import begin
from stepwell.setting.bill import bill_of

GUIDE = Path(__file__).parent.parent.parent / "docs" / "guide" / "new-path.md"


def path_of_the_guide() -> Any:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (code,) = (block for block in blocks if block.startswith('"""Born again'))
    names: dict[str, Any] = {}
    exec(compile(code, str(GUIDE), "exec"), names)
    return names["PATH"]


@pytest.mark.parametrize("student", [(), ("--student", "cifar_resnet20")])
def test_born_again_ends_in_a_student_and_costs_what_it_says(data, teacher, tmp_path, student):
    path = path_of_the_guide()
    words = ["--teacher", teacher, "--data", data, "--out", tmp_path / "out", *QUICK, *student]
    config = cli.parse("compress", CompressConfig, [str(word) for word in words])
    finished = path.descend(begin(config, exports=False), lambda s, finished: (s, finished))
    s, models = finished
    assert list(s.run.stages) == ["score", "grid", "plan", "parent", "distill"]
    assert [assistant.keep_ratio for assistant in models.assistants] == [models.student.keep_ratio]
    assert models.student.is_other == bool(student)
    expected = path.bill(s.costs(models.ladder.scales), Epochs(joint=2.0, distill=2.0), s.config)
    assert bill_of(s.run) == pytest.approx(expected)
