"""Objectives and tasks that a configuration may name."""

from d2v2ds.objectives.data2vec1 import Data2Vec1Config
from d2v2ds.objectives.data2vec2 import Data2Vec2Config
from d2v2ds.objectives.mae import MaeConfig
from d2v2ds.tasks.known import AnyTaskConfig

ObjectiveConfig = Data2Vec2Config | Data2Vec1Config | MaeConfig | AnyTaskConfig
"""Settings of any objective; its `name` chooses."""
