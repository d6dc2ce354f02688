"""Objectives and tasks that a configuration may name."""

from d2v2ds.objectives.data2vec2 import Data2Vec2Config
from d2v2ds.objectives.mae import MaeConfig
from d2v2ds.tasks.classify import ClassifyConfig
from d2v2ds.tasks.ctc import CtcConfig

ObjectiveConfig = Data2Vec2Config | MaeConfig | CtcConfig | ClassifyConfig
"""Settings of any objective; its `name` chooses."""
