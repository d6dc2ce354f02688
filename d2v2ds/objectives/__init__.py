"""Objectives of a run: losses, targets and the teacher's network, behind the protocol `Objective`.

`ObjectiveConfig` lists the objectives; its member is chosen by the `name` of the YAML section `objective`.
"""

from d2v2ds.objectives.data2vec2 import Data2Vec2Config

ObjectiveConfig = Data2Vec2Config
"""Settings of any objective; a union once there are several."""
