"""Objectives of pretraining: losses, targets and the teacher's network, behind the protocol `Objective`.

`d2v2ds/config/objectives.py` lists them together with the fine-tuning tasks.
"""
