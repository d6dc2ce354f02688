"""Tasks that there are; a new one is one more member here."""

from typing import get_args

from d2v2ds.tasks.classify import ClassifyConfig
from d2v2ds.tasks.ctc import CtcConfig

AnyTaskConfig = CtcConfig | ClassifyConfig
"""Settings of any task; its `name` chooses."""
TASKS: dict[str, type[AnyTaskConfig]] = {one.name: one for one in get_args(AnyTaskConfig)}
"""Settings of each task, by its name in a description."""
